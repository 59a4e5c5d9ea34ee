"""Kernels of the C library on TensorFlow: `tf.numpy_function` calls them on memory shared with NumPy."""

import math
import sys

import numpy as np
import tensorflow as tf

from keras_jamba import _native
from keras_jamba._keras_internals import is_keras_export


def is_being_exported():
    """Returns whether an export traces this graph, which TensorFlow shows in the call stack only."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if is_keras_export(module) or module.startswith("tensorflow.python.saved_model."):
            return True
        frame = frame.f_back
    return False


def differentiable(kernel, portable):
    """Returns a kernel as a function `(tensors, options) -> outputs` with its gradient.

    `portable`, the same function in Keras operations, gives the gradient if the library has no backward function.
    """
    num_outputs = len(kernel.outputs) - kernel.num_residuals
    names = (*kernel.inputs, *kernel.outputs[num_outputs:], *(f"grad_{name}" for name in kernel.outputs[:num_outputs]))

    def forward(tensors, options, train):
        def outputs(arrays):
            shapes = {name: x.shape for name, x in arrays.items()}
            return kernel.output_specs(shapes, arrays[kernel.inputs[0]].dtype, train)

        types = [tensors[0].dtype] + [tf.float32] * (len(kernel.outputs) - 1)
        return _call(
            kernel, False, dict(zip(kernel.inputs, tensors, strict=True)), kernel.outputs, outputs, types, options
        )

    def backward(tensors, residuals, grads, options):
        wanted = [
            name for name, x in zip(kernel.inputs[: kernel.differentiable], tensors, strict=False) if x is not None
        ]
        given = dict(zip(names, (*tensors, *residuals, *grads), strict=True))
        outputs = lambda arrays: [(arrays[name].shape, arrays[name].dtype) for name in wanted]  # noqa: E731
        types = [given[name].dtype for name in wanted]
        found = _call(kernel, True, given, [f"grad_{name}" for name in wanted], outputs, types, options)
        return [tf.ensure_shape(x, given[name].shape) for x, name in zip(found, wanted, strict=True)]

    def function(tensors, options):
        present = [x for x in tensors if x is not None]

        @tf.custom_gradient
        def on_tensors(*present):
            remaining = iter(present)
            arguments = [None if x is None else next(remaining) for x in tensors]
            found = forward(arguments, options, True)
            residuals = found[num_outputs:]

            def vjp(*grads):
                if not kernel.backward:
                    with tf.GradientTape() as tape:
                        tape.watch([x for x in present if x.dtype.is_floating])
                        outputs = portable(arguments, options)
                    return tape.gradient(outputs, present, grads)
                gradient = lambda *grads: backward(arguments, residuals, grads, options)  # noqa: E731
                grads = _without_second_derivative(kernel, gradient, present, grads)
                return [*grads, *[None] * (len(present) - len(grads))]

            return found[:num_outputs], vjp

        # `tf.custom_gradient` would treat a variable among the inputs as captured.
        outputs = on_tensors(*map(tf.convert_to_tensor, present))
        return [tf.ensure_shape(x, spec) for x, spec in zip(outputs, _static_shapes(kernel, tensors), strict=False)]

    return function


def _without_second_derivative(kernel, gradient, present, grads):
    """Returns `gradient(*grads)`, whose own gradient raises RuntimeError. TensorFlow would use zeros.

    `present` are the inputs, on which the gradient also depends.
    """

    @tf.custom_gradient
    def function(*tensors):
        def refuse(*_):
            raise RuntimeError(kernel.no_second_derivative)

        return gradient(*tensors[len(present) :]), refuse

    return function(*present, *grads)


def _static_shapes(kernel, tensors):
    first, second = tensors[0].shape, [x for x, name in zip(tensors, kernel.inputs, strict=True) if name == "A"]
    return [first] + [(first[0], *x.shape) for x in second]


def _call(kernel, backward, tensors, output_names, output_specs, types, options):
    """Calls the kernel as an operation. `output_specs(arrays)` returns `[(shape, dtype)]` for NumPy inputs."""
    tensors = {name: x for name, x in tensors.items() if x is not None}

    def run(*arrays):
        arrays = dict(zip(tensors, map(np.ascontiguousarray, arrays), strict=True))
        made = [_empty(shape, dtype) for shape, dtype in output_specs(arrays)]
        if arrays[kernel.inputs[0]].size == 0:
            return [np.zeros_like(x) for x in made]
        given = {name: _array(x) for name, x in (arrays | dict(zip(output_names, made, strict=True))).items() if x.size}
        kernel.run(backward, given, dict(zip(kernel.options, options, strict=True)), _threads())
        return made

    found = tf.numpy_function(run, list(tensors.values()), types, stateful=False)
    return [found] if len(types) == 1 and not isinstance(found, (list, tuple)) else list(found)


def _empty(shape, dtype):
    """Returns an empty array aligned to 64 bytes. TensorFlow would copy an unaligned one."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 63, "uint8")
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _array(x):
    return _native.Array(x.ctypes.data, x.shape, x.dtype.name, x.shape[-1] if x.ndim else 0)


def _threads():
    return tf.config.threading.get_intra_op_parallelism_threads() or _native.cores()

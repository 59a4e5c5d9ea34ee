"""Kernels of the C library on PyTorch: registered operators, which `torch.compile` does not trace into."""

import ctypes
import functools

import torch

from keras_jamba._native import Array


def differentiable(kernel, portable, operator):
    """Returns a kernel as a function `(tensors, options) -> outputs` with its gradient.

    `portable`, the same function in Keras operations, gives the gradient if there is no backward function.
    `operator(kernel, backward)` creates the operator of one direction.
    """
    forward = operator(kernel, False)
    backward = operator(kernel, True) if kernel.backward else None
    count, num_outputs = len(kernel.inputs), len(kernel.outputs) - kernel.num_residuals

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:count], *_as_list(output)[num_outputs:])
        ctx.options = inputs[count:]
        ctx.set_materialize_grads(False)

    def gradient(ctx, *grads):
        saved = ctx.saved_tensors
        first = torch.zeros_like(saved[0]) if grads[0] is None else grads[0]
        found = backward.registered(*saved, first, *grads[1:num_outputs], *ctx.options)
        found = [None if x is None else grad for x, grad in zip(saved, _as_list(found), strict=False)]
        return (*found, *[None] * (count + len(ctx.options) - len(found)))

    def portable_gradient(ctx, *grads):
        saved = ctx.saved_tensors
        again = torch.is_grad_enabled()  # for second derivatives
        with torch.enable_grad():
            given = [x if x is None or again else x.detach().requires_grad_(x.requires_grad) for x in saved]
            outputs = portable(given, ctx.options[:-1])  # without `train`
            wanted = [i for i, x in enumerate(given) if x is not None and x.requires_grad]
            found = torch.autograd.grad(outputs, [given[i] for i in wanted], grads, create_graph=again)
        found = dict(zip(wanted, found, strict=True))
        return tuple(found.get(i) for i in range(count + len(ctx.options)))

    def no_gradient(ctx, *grads):
        raise RuntimeError(kernel.no_second_derivative)

    if kernel.backward:
        backward.registered.register_autograd(no_gradient)
    forward.registered.register_autograd(gradient if kernel.backward else portable_gradient, setup_context=setup)

    def function(tensors, options):
        train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        return _as_list(forward.registered(*tensors, *options, int(train)))[:num_outputs]

    return function


class Operator:
    """One direction of a kernel as a registered operator.

    Its arguments are the tensors, any of which may be None, the options and `train`.
    """

    def __init__(self, kernel, backward):
        self.kernel, self.backward = kernel, backward
        self.inputs, self.outputs = kernel.inputs, kernel.outputs
        if backward:
            num_outputs = kernel.outputs[: len(kernel.outputs) - kernel.num_residuals]
            self.inputs += (*kernel.outputs[len(num_outputs) :], *(f"grad_{name}" for name in num_outputs))
            self.outputs = kernel.gradients
        tensors = ", ".join(f"Tensor? {name}" for name in self.inputs)
        integers = ", ".join(f"int {name}" for name in (*kernel.options, "train"))
        returns = ", ".join(["Tensor"] * len(self.outputs))
        self.registered = torch.library.custom_op(
            f"keras_jamba::{kernel.name}_{'backward' if backward else 'forward'}",
            self.run,
            mutates_args=(),
            schema=f"({tensors}, {integers}) -> ({returns})",
        )
        self.registered.register_fake(self.empty)

    def _named(self, arguments):
        return dict(zip(self.inputs, arguments, strict=False)), arguments[len(self.inputs) :]

    def empty(self, *arguments):
        """Returns uninitialised outputs. An operator cannot return None, so absent outputs are empty tensors."""
        tensors, (*_, train) = self._named(arguments)
        first = arguments[0]
        if self.backward:
            given = arguments[: self.kernel.differentiable]
            specs = [((0,), first.dtype) if x is None else (x.shape, x.dtype) for x in given]
        else:
            shapes = {name: x.shape for name, x in tensors.items() if x is not None}
            specs = self.kernel.output_specs(shapes, first.dtype, train)
        return _from_list([first.new_empty(shape, dtype=_DTYPES.get(dtype, dtype)) for shape, dtype in specs])

    def run(self, *arguments):
        if 0 in arguments[0].shape:
            return _from_list([torch.zeros_like(x) for x in _as_list(self.empty(*arguments))])
        tensors, (*options, train) = self._named(arguments)
        return self.computed(tensors, dict(zip(self.kernel.options, options, strict=True)), train, arguments)

    def computed(self, tensors, options, train, arguments):
        outputs = self.empty(*arguments)
        # The dict keeps copies alive during the call.
        tensors = {name: self._readable(name, x) for name, x in tensors.items() if x is not None and 0 not in x.shape}
        made = {name: x for name, x in zip(self.outputs, _as_list(outputs), strict=True) if 0 not in x.shape}
        arrays = {name: _array(x) for name, x in (tensors | made).items()}
        self.kernel.run(self.backward, arrays, options, torch.get_num_threads(), _openmp())
        return outputs

    def _readable(self, name, x):
        """Returns `x` itself if the library can read it, otherwise a contiguous copy."""
        _, with_rows = self.kernel.field(name)
        return x if with_rows and x.dim() == 3 and row_step(x) is not None else x.contiguous()


@functools.cache
def _openmp():
    """Returns the address of `GOMP_parallel` in PyTorch's own OpenMP, or None.

    Its threads keep their cores busy after each operation, and would delay other threads on these cores.
    """
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


_DTYPES = {"float32": torch.float32}


def _as_list(x):
    return [x] if isinstance(x, torch.Tensor) else list(x)


def _from_list(x):
    return x[0] if len(x) == 1 else tuple(x)


def row_step(x):
    """Returns the constant stride between tokens, also across rows. None if it varies or channels have gaps."""
    batch, length, channels = x.shape
    if channels > 1 and x.stride(2) != 1:
        return None
    if batch * length == 1:
        return channels
    if length == 1:
        return x.stride(0)
    return x.stride(1) if batch == 1 or x.stride(0) == length * x.stride(1) else None


def _array(x):
    row = row_step(x) if x.dim() == 3 else 0
    # A contiguous tensor may have any stride along an axis of size 0 or 1.
    return Array(x.data_ptr(), tuple(x.shape), str(x.dtype).removeprefix("torch."), x.shape[-1] if row is None else row)

"""Marks, conversions, gradients and comparisons that tests share on every backend."""

import hypothesis
import keras
import numpy as np
import pytest
from keras import ops

# PyTorch, because its tests run fastest.
once = pytest.mark.skipif(keras.backend.backend() != "torch", reason="the same on every backend; runs on torch")


def full(*backends):
    """Marks a test that `make test-all` runs and `make test` skips, on `backends` or, if none is named, on all.

    For kill and process tests, meshes, trained examples and live peers. Also for tests that a backend compiles for more
    than a few seconds, if another backend runs the same test in `make test`.
    """
    marked = not backends or keras.backend.backend() in backends
    return pytest.mark.full if marked else lambda function: function


def draws(count):
    """Returns the settings of a property test of `count` drawn cases: two fifths of them where each shape compiles."""
    compiles = keras.backend.backend() != "torch"
    return hypothesis.settings(max_examples=2 * count // 5 if compiles else count, deadline=None, derandomize=True)


def numpy(tree):
    """Returns `tree` with every tensor as a NumPy array."""
    return keras.tree.map_structure(lambda x: ops.convert_to_numpy(ops.stop_gradient(x)), tree)


def jitted(function):
    """Returns `function` compiled as one program on JAX, which otherwise compiles each operation per shape.

    Layers must be built before. The program uses the weights of its first call and discards updates of variables.
    """
    if keras.backend.backend() != "jax":
        return function
    import jax

    @jax.jit
    def program(*args, **given):
        with keras.StatelessScope():
            return function(*args, **given)

    return program


def gradients(function, tensors):
    """Returns the gradients of a scalar function of a list of tensors, as NumPy arrays."""
    return gradient_of(function)(tensors)


def gradient_of(function):
    """Returns a function of a list of tensors: the gradients of the scalar `function`, as NumPy arrays.

    JAX compiles it once per shape.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        compiled = jitted(jax.grad(lambda xs: function(*xs)))

    def call(tensors):
        tensors = [ops.convert_to_tensor(x) for x in tensors]
        if backend == "jax":
            grads = compiled(tensors)
        elif backend == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                tape.watch(tensors)
                loss = function(*tensors)
            grads = tape.gradient(loss, tensors)
        else:
            import torch

            tensors = [x.detach().requires_grad_(True) for x in tensors]
            grads = torch.autograd.grad(function(*tensors), tensors, allow_unused=True)
        return [np.asarray(ops.convert_to_numpy(0.0 if g is None else g)) for g in grads]

    return call


def close(actual, expected, relative=1e-4, absolute=1e-6):
    """Checks that a tensor equals an array within the tolerances."""
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=relative, atol=absolute)


def variable_gradients(function, variables):
    """Returns the gradients of a scalar `function()` with respect to Keras variables, as NumPy arrays."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def stateless(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function()

        grads = jax.jit(jax.grad(stateless))([v.value for v in variables])
    elif backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = function()
        grads = [tf.convert_to_tensor(g) for g in tape.gradient(loss, [v.value for v in variables])]
    else:
        import torch

        grads = torch.autograd.grad(function(), [v.value for v in variables])
    return [np.asarray(ops.convert_to_numpy(g)) for g in grads]


def torch_operations(function):
    """Returns `[(name, shape of the first argument or None)]` of the PyTorch operations in a call of `function`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            first = args[0] if args else None
            found.append((function._schema.name, tuple(first.shape) if hasattr(first, "shape") else None))
            return function(*args, **(kwargs or {}))

    found = []
    with Recorder():
        function()
    return found

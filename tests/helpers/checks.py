"""What several tests do on whichever backend runs."""

import keras
import numpy as np
import pytest
from keras import ops

# PyTorch's tests are the shortest.
once = pytest.mark.skipif(keras.backend.backend() != "torch", reason="the same on every backend; runs on torch")


def full(*backends):
    """Marks a test that `make test-all` runs and `make test` leaves out: on these backends, or on all if none is named.

    For kill and process tests, meshes, trained examples and live peers; and for what takes a backend more than a few
    seconds to compile, where another backend runs the same test in `make test`.
    """
    here = not backends or keras.backend.backend() in backends
    return pytest.mark.full if here else lambda function: function


def numpy(tree):
    return keras.tree.map_structure(lambda x: ops.convert_to_numpy(ops.stop_gradient(x)), tree)


def jitted(function):
    """`function` as one program on JAX, which would otherwise compile every operation of every shape by itself.

    Layers are to be built before. Their weights are those of the first call, and what they write down is not kept.
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
    """Gradients of a scalar function of a list of tensors, as NumPy arrays."""
    backend = keras.backend.backend()
    tensors = [ops.convert_to_tensor(x) for x in tensors]
    if backend == "jax":
        import jax

        grads = jitted(jax.grad(lambda xs: function(*xs)))(tensors)
    elif backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = function(*tensors)
        grads = tape.gradient(loss, tensors)
    else:
        import torch

        tensors = [x.detach().requires_grad_(True) for x in tensors]
        grads = torch.autograd.grad(function(*tensors), tensors)
    return [np.asarray(ops.convert_to_numpy(g)) for g in grads]


def close(actual, expected, relative=1e-4, absolute=1e-6):
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=relative, atol=absolute)


def variable_gradients(function, variables):
    """Gradients of a scalar `function()` for Keras variables that it reads, as NumPy arrays."""
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
    """`[(name, shape of the first argument or None)]` of the operations of PyTorch that a call of `function` takes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            first = args[0] if args else None
            found.append((function._schema.name, tuple(first.shape) if hasattr(first, "shape") else None))
            return function(*args, **(kwargs or {}))

    found = []
    with Seen():
        function()
    return found

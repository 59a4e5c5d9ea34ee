"""Peers of `benchmarks.scan.cpu`: other implementations of the selective scan, one table per backend.

Every peer has the signature of `keras_jamba.ops.selective_scan` with softplus, gate, skip and bias.
"""

import keras


def _gating_and_masks(states_of):
    """Returns the complete op from `(decay, inputs) -> states`, all of shape `(b, t, e, n)`."""
    from keras import ops

    def scan(u, delta, A, B, C, D, z, delta_bias):
        delta = ops.softplus(delta + delta_bias)
        decay = ops.exp(delta[..., None] * A)
        inputs = (delta * u)[..., None] * B[:, :, None, :]
        y = ops.squeeze(ops.matmul(states_of(decay, inputs), C[..., None]), -1)
        return (y + D * u) * ops.silu(z)

    return scan


def _combine(left, right):
    return left[0] * right[0], left[1] * right[0] + right[1]


def _jax_peers():
    import jax
    from jax import numpy as jnp

    def tree(decay, inputs):
        return jax.lax.associative_scan(_combine, (decay, inputs), axis=1)[1]

    def loop(u, delta, A, B, C, D, z, delta_bias):
        """Runs `jax.lax.scan` over the tokens; JAX differentiates it."""
        delta = jax.nn.softplus(delta + delta_bias)

        def token(state, token):
            u, delta, B, C = token
            state = jnp.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None, :]
            return state, jnp.sum(state * C[:, None, :], axis=-1)

        tokens = [jnp.swapaxes(x, 0, 1) for x in (u, delta, B, C)]
        _, y = jax.lax.scan(token, jnp.zeros((u.shape[0], *A.shape)), tokens)
        return (jnp.swapaxes(y, 0, 1) + D * u) * jax.nn.silu(z)

    return {"lax.scan": loop, "lax.associative_scan": _gating_and_masks(tree)}


def _torch_peers():
    from mambapy.pscan import pscan

    return {"mambapy": _gating_and_masks(pscan)}


def _tensorflow_peers():
    from keras import ops

    def tree(decay, inputs):
        # Inside a graph, keras.ops.associative_scan loses the shape of its output.
        return ops.reshape(ops.associative_scan(_combine, (decay, inputs), axis=1)[1], decay.shape)

    return {"keras.ops.associative_scan": _gating_and_masks(tree)}


def peers():
    return {"jax": _jax_peers, "torch": _torch_peers, "tensorflow": _tensorflow_peers}[keras.backend.backend()]()

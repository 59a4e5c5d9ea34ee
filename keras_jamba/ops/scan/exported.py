"""The selective scan in exported graphs: one loop over the tokens in standard operators, for any length."""

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops.scan._gating_and_masks import with_gating_and_masks


def why_not(call):
    if _backend.tensors.is_traced_by_torchscript():
        return "TorchScript does not support its loop"
    if not _backend.compilation.needs_portable_operations(call.shape):
        return "it is the form of exported graphs, and slower than the others here"
    return None


def _recurrence(u, delta, A, B, C, state, reset):
    def token(state, token, A):
        u, delta, B, C, *resets = token
        for reset in resets:
            state = ops.where(reset[:, None, None], ops.zeros_like(state), state)
        state = ops.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None]
        return state, ops.sum(state * C[:, None], axis=-1)

    tokens = (u, delta, B, C) if reset is None else (u, delta, B, C, reset)
    by_time = [ops.swapaxes(x, 0, 1) for x in tokens]
    last, y = _backend.compilation.scan(token, state, tuple(by_time), constants=(A,))
    return ops.swapaxes(y, 0, 1), last


run = with_gating_and_masks(_recurrence)

"""The selective scan as a parallel tree of few, wide operations, for accelerators.

The states of all tokens are in memory at once (b * t * e * n floats), several times in the backward pass. The
scan combines pairs, solves the problem of half the length, and fills in the tokens between, as in Blelloch (1990),
"Prefix sums and their applications". `keras.ops.associative_scan` is not used: on PyTorch it always returns float32 on
the default device, and on TensorFlow it fails in `fit`.
"""

from keras import ops

from keras_jamba.ops.scan._gating_and_masks import decay, why_not_traced, with_gating_and_masks


def why_not(call):
    if call.length is None:
        return "tracing builds the tree and requires a static length"
    return why_not_traced(call)


def _recurrence(u, delta, A, B, C, state, reset):
    factors = decay(delta, A, reset)
    inputs = (delta * u)[..., None] * B[:, :, None, :]
    first = inputs[:, :1] + factors[:, :1] * state[:, None]
    states = _prefix(factors, ops.concatenate([first, inputs[:, 1:]], axis=1))
    return ops.einsum("bten,btn->bte", states, C), states[:, -1]


def _prefix(decay, inputs):
    """Computes all h_t of h_t = decay_t h_{t-1} + inputs_t with h_{-1} = 0, along axis 1."""
    length = inputs.shape[1]
    if length == 1:
        return inputs
    paired = length // 2 * 2
    later = decay[:, 1:paired:2]
    odd = _prefix(later * decay[:, 0:paired:2], inputs[:, 1:paired:2] + later * inputs[:, 0:paired:2])
    before = odd[:, : (length - 1) // 2]
    even = ops.concatenate([inputs[:, :1], inputs[:, 2::2] + decay[:, 2::2] * before], axis=1)
    return _interleave(even, odd)


def _interleave(even, odd):
    pairs = odd.shape[1]
    shape = ops.shape(odd)
    mixed = ops.stack([even[:, :pairs], odd], axis=2)
    mixed = ops.reshape(mixed, (shape[0], 2 * pairs, *shape[2:]))
    return mixed if even.shape[1] == pairs else ops.concatenate([mixed, even[:, pairs:]], axis=1)


run = with_gating_and_masks(_recurrence)

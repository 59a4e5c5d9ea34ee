"""The selective scan as a parallel tree: few, wide operations, which is what an accelerator likes.

The states of all tokens are held at once (b * t * e * n floats), in the backward pass several times.
Blelloch (1990), "Prefix sums and their applications": pairs are combined, the half as long problem is
solved, and the tokens between are filled in. Our own, because `keras.ops.associative_scan` returns
float32 on the default device whatever it got on PyTorch and fails in `fit` on TensorFlow.
"""

from keras import ops

from keras_jamba.ops.scan._gating_and_masks import decay, why_not_traced, with_gating_and_masks


def why_not(call):
    if call.length is None:
        return "the tree is laid out when it is traced and needs a static length"
    return why_not_traced(call)


def _recurrence(u, delta, A, B, C, state, reset):
    factors = decay(delta, A, reset)
    inputs = (delta * u)[..., None] * B[:, :, None, :]
    first = inputs[:, :1] + factors[:, :1] * state[:, None]
    states = _prefix(factors, ops.concatenate([first, inputs[:, 1:]], axis=1))
    return ops.einsum("bten,btn->bte", states, C), states[:, -1]


def _prefix(decay, inputs):
    """All h_t of h_t = decay_t h_{t-1} + inputs_t with h_{-1} = 0, along axis 1."""
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

"""The selective scan as a parallel tree of few, wide operations, for accelerators.

The states of all tokens are in memory at once (b * t * e * n floats), several times in the backward pass. The
scan combines pairs, solves the problem of half the length, and fills in the tokens between, as in Blelloch (1990),
"Prefix sums and their applications". `keras.ops.associative_scan` is not used: on PyTorch it always returns float32 on
the default device, and on TensorFlow it fails in `fit`.
"""

from keras import ops

from keras_jamba.ops.scan._gating_and_masks import why_not_traced, with_gating_and_masks


def why_not(call):
    if call.length is None:
        return "tracing builds the tree and requires a static length"
    return why_not_traced(call)


def _recurrence(u, delta, A, B, C, state, reset):
    factors = ops.exp(delta[..., None] * A)
    inputs = (delta * u)[..., None] * B[:, :, None, :]
    first = inputs[:, :1] + factors[:, :1] * state[:, None]
    begins = None if reset is None else reset[:, :, None, None]
    states = _prefix(factors, ops.concatenate([first, inputs[:, 1:]], axis=1), begins)
    return ops.einsum("bten,btn->bte", states, C), states[:, -1]


def _prefix(decay, inputs, begins):
    """Computes all h_t of h_t = decay_t h_{t-1} + inputs_t with h_{-1} = 0, along axis 1.

    Where `begins` `(b, t, 1, 1)` is True, zeros replace h_{t-1}.
    """
    length = inputs.shape[1]
    if length == 1:
        return inputs
    paired = length // 2 * 2
    earlier, later = slice(0, paired, 2), slice(1, paired, 2)
    cut = None if begins is None else begins[:, later]
    factors = decay[:, later] * _kept(decay[:, earlier], cut)
    pairs = inputs[:, later] + decay[:, later] * _kept(inputs[:, earlier], cut)
    odd = _prefix(factors, pairs, None if begins is None else ops.logical_or(cut, begins[:, earlier]))
    before = _kept(odd[:, : (length - 1) // 2], None if begins is None else begins[:, 2::2])
    even = ops.concatenate([inputs[:, :1], inputs[:, 2::2] + decay[:, 2::2] * before], axis=1)
    return _interleave(even, odd)


def _kept(before, begins):
    return before if begins is None else ops.where(begins, ops.zeros_like(before), before)


def _interleave(even, odd):
    pairs = odd.shape[1]
    shape = ops.shape(odd)
    mixed = ops.stack([even[:, :pairs], odd], axis=2)
    mixed = ops.reshape(mixed, (shape[0], 2 * pairs, *shape[2:]))
    return mixed if even.shape[1] == pairs else ops.concatenate([mixed, even[:, pairs:]], axis=1)


run = with_gating_and_masks(_recurrence)

"""The selective scan by its definition, one token at a time; the backend computes the gradient.

Gu and Dao (2023), "Mamba", arXiv:2312.00752, section 3.2 and algorithm 2: zero-order hold for A,
Euler's rule for B.
"""

from keras import ops

from keras_jamba.ops.scan._gating_and_masks import why_not_traced, with_gating_and_masks


def why_not(call):
    if call.length is None:
        return "it is a Python loop over tokens and requires a static length"
    return why_not_traced(call)


def _recurrence(u, delta, A, B, C, state, reset):
    factors = ops.exp(delta[..., None] * A)
    outputs = []
    for t in range(u.shape[1]):
        if reset is not None:
            state = ops.where(reset[:, t, None, None], ops.zeros_like(state), state)
        state = factors[:, t] * state + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append(ops.sum(state * C[:, t, None, :], axis=-1))
    return ops.stack(outputs, axis=1), state


run = with_gating_and_masks(_recurrence)

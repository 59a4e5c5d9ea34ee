"""Every expert on every token: the definition, and the fastest form where most experts are chosen anyway."""

import math

from keras import ops


def why_not(call):
    if call.limited:
        return "it drops no token"
    return None


def run(tokens, weights, indices, up_bank, down_bank, gate_bank):
    experts, d, f = up_bank.shape
    chosen = ops.one_hot(indices, experts, dtype=weights.dtype)
    gates = ops.cast(ops.sum(chosen * weights[..., None], axis=1), tokens.dtype)
    # All experts side by side are one wide perceptron: plain matrix products.
    wide = lambda bank: ops.reshape(ops.transpose(bank, (1, 0, 2)), (d, experts * f))  # noqa: E731
    up = ops.matmul(tokens, wide(up_bank))
    gate = None if gate_bank is None else ops.matmul(tokens, wide(gate_bank))
    hidden = ops.reshape(activation(up, gate), (-1, experts, f)) * gates[:, :, None]
    return ops.matmul(ops.reshape(hidden, (-1, experts * f)), ops.reshape(down_bank, (experts * f, d)))


def activation(up, gate=None):
    """Between an expert's two layers: SwiGLU, or GELU where there is no gate."""
    return ops.gelu(up, approximate=False) if gate is None else ops.silu(gate) * up


def activation_gradient(gradient, up, gate=None):
    """Gradients for `up`, or for `up` and `gate`, from the one for `activation(up, gate)`."""
    if gate is None:
        density = ops.exp(-0.5 * ops.square(up)) * (2 * math.pi) ** -0.5
        return [gradient * (0.5 * (1 + ops.erf(up * 0.5**0.5)) + up * density)]
    opened = ops.sigmoid(gate)
    return [gradient * opened * gate, gradient * up * opened * (1 + gate * (1 - opened))]

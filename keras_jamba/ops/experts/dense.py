"""Every expert on every token: the definition, and the fastest form if each token chooses most experts."""

import math

from keras import ops

# Up to this number of tokens, transposing the banks takes longer than multiplying by them.
FEW = 16


def why_not(call):
    if call.limited:
        return "it does not support capacity_factor"
    return None


def run(tokens, weights, indices, up_bank, down_bank, gate_bank):
    experts, d, f = up_bank.shape
    chosen = ops.one_hot(indices, experts, dtype=weights.dtype)
    gates = ops.cast(ops.sum(chosen * weights[..., None], axis=1), tokens.dtype)
    # A comparison would fix a symbolic size.
    if isinstance(tokens.shape[0], int) and tokens.shape[0] <= FEW:
        return _expert_by_expert(tokens, gates, up_bank, down_bank, gate_bank)
    # All experts together are one wide perceptron: plain matrix products.
    wide = lambda bank: ops.reshape(ops.transpose(bank, (1, 0, 2)), (d, experts * f))  # noqa: E731
    up = ops.matmul(tokens, wide(up_bank))
    gate = None if gate_bank is None else ops.matmul(tokens, wide(gate_bank))
    hidden = ops.reshape(activation(up, gate), (-1, experts, f)) * gates[:, :, None]
    return ops.matmul(ops.reshape(hidden, (-1, experts * f)), ops.reshape(down_bank, (experts * f, d)))


def _expert_by_expert(tokens, gates, up_bank, down_bank, gate_bank):
    x = ops.broadcast_to(tokens[None], (up_bank.shape[0], *tokens.shape))
    gate = None if gate_bank is None else ops.matmul(x, gate_bank)
    hidden = activation(ops.matmul(x, up_bank), gate) * ops.transpose(gates)[..., None]
    return ops.sum(ops.matmul(hidden, down_bank), axis=0)


def activation(up, gate=None):
    """Computes the activation between an expert's two layers: SwiGLU, or GELU without a gate."""
    return ops.gelu(up, approximate=False) if gate is None else ops.silu(gate) * up


def activation_gradient(gradient, up, gate=None):
    """Returns `[grad_up]`, or `[grad_up, grad_gate]` with a gate, from the gradient of `activation(up, gate)`."""
    if gate is None:
        density = ops.exp(-0.5 * ops.square(up)) * (2 * math.pi) ** -0.5
        return [gradient * (0.5 * (1 + ops.erf(up * 0.5**0.5)) + up * density)]
    opened = ops.sigmoid(gate)
    return [gradient * opened * gate, gradient * up * opened * (1 + gate * (1 - opened))]

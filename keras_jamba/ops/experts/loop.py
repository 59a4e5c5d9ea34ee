"""Tokens sorted by expert into blocks of one expert each, and a loop over the blocks: for JAX on a CPU.

The layout is that of `blocks`, but the loop copies no weights and skips empty blocks. The gradient is written by
hand, because JAX cannot differentiate a loop whose length depends on the routing.
"""

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops.experts.blocks import through_blocks
from keras_jamba.ops.experts.dense import activation, activation_gradient


def why_not(call):
    if call.limited:
        return "it does not support capacity_factor"
    if not _backend.compilation.has_fast_dynamic_loop():
        return "it requires JAX on a CPU: a loop over blocks is slow elsewhere"
    if 2 * call.per_token >= call.experts:
        return "each token chooses at least half of the experts: 'dense' does no more work"
    return None


def run(tokens, weights, indices, up_bank, down_bank, gate_bank):
    first_banks = (up_bank,) if gate_bank is None else (up_bank, gate_bank)

    def perceptrons(x, expert_of_block, used):
        return _perceptrons(x, expert_of_block, used, down_bank, *first_banks)

    size = _block_size(tokens.shape[0], indices.shape[1], up_bank.shape[0])
    return through_blocks(perceptrons, size, tokens, weights, indices, up_bank.shape[0])


def _block_size(tokens, k, experts):
    """Returns a power of two from 16 to 128, about half of the tokens per expert of an even routing."""
    if tokens is None:
        return 64
    size = 16
    while size < 128 and 2 * size < tokens * k // experts:
        size *= 2
    return size


def _forward(x, expert_of_block, used, down_bank, *first_banks):
    """Computes the outputs of blocks `(blocks, size, d)`; those after the first `used` stay zero."""
    wide = (*x.shape[:2], down_bank.shape[1])

    def block(i, carry):
        y, firsts = carry
        expert = expert_of_block[i]
        mine = [ops.matmul(x[i], bank[expert]) for bank in first_banks]
        y = _put(y, i, ops.matmul(activation(*mine), down_bank[expert]))
        return y, [_put(all_, i, one) for all_, one in zip(firsts, mine, strict=True)]

    start = ops.zeros_like(x), [ops.zeros(wide, x.dtype) for _ in first_banks]
    y, firsts = ops.fori_loop(0, used, block, start)
    return y, (x, expert_of_block, used, down_bank, first_banks, firsts)


def _backward(residuals, gradient):
    x, expert_of_block, used, down_bank, first_banks, firsts = residuals

    def block(i, carry):
        d_x, d_down, d_banks = carry
        expert, mine = expert_of_block[i], [first[i] for first in firsts]
        d_down = _add(d_down, expert, ops.matmul(ops.transpose(activation(*mine)), gradient[i]))
        d_hidden = ops.matmul(gradient[i], ops.transpose(down_bank[expert]))
        d_mine = activation_gradient(d_hidden, *mine)
        d_xi = sum(ops.matmul(g, ops.transpose(bank[expert])) for g, bank in zip(d_mine, first_banks, strict=True))
        given = ops.transpose(x[i])
        d_banks = [_add(all_, expert, ops.matmul(given, g)) for all_, g in zip(d_banks, d_mine, strict=True)]
        return _put(d_x, i, d_xi), d_down, d_banks

    start = ops.zeros_like(x), ops.zeros_like(down_bank), [ops.zeros_like(bank) for bank in first_banks]
    d_x, d_down, d_banks = ops.fori_loop(0, used, block, start)
    return d_x, None, None, d_down, *d_banks


def _put(stack, i, x):
    return ops.slice_update(stack, (i, *(0 for _ in x.shape)), x[None])


def _add(stack, i, x):
    return _put(stack, i, stack[i] + x)


_perceptrons = _backend.autodiff.custom_gradient(_forward, _backward)

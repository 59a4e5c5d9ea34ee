"""Tokens sorted by expert, in blocks of a few tokens of one expert each: batched products of static shape.

An expert's last block is filled up with zero rows. The number of blocks is the most that any routing can
need, so nothing is dropped and no shape depends on the routing.
"""

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops.experts._moving import moved
from keras_jamba.ops.experts.dense import FEW, activation
from keras_jamba.ops.quantization import QuantizedTensor, picked


def why_not(call):
    if call.limited:
        return "it drops no token"
    few = call.tokens is not None and call.tokens <= FEW
    if not _backend.compilation.has_jit() and not (few and call.is_quantized):
        return "PyTorch runs eagerly, where 'split' does the same without padding"
    if few and call.tokens * call.per_token >= call.experts or 2 * call.per_token >= call.experts:
        return "half of the experts are chosen or more, or all by few tokens, where 'dense' does as little work"
    return None


def run(tokens, weights, indices, up_bank, down_bank, gate_bank):
    def perceptrons(x, expert_of_block, used):
        def through(x, bank):
            few = isinstance(bank, QuantizedTensor)
            return ops.matmul(x, picked(bank, expert_of_block, x.dtype) if few else _picked(bank, expert_of_block))

        gate = None if gate_bank is None else through(x, gate_bank)
        return through(activation(through(x, up_bank), gate), down_bank)

    size = _block_size(tokens.shape[0], indices.shape[1], up_bank.shape[0])
    return through_blocks(perceptrons, size, tokens, weights, indices, up_bank.shape[0])


def through_blocks(perceptrons, size, tokens, weights, indices, experts):
    """Sorts tokens into blocks of `size`, and sums, weighted, what `perceptrons` makes of them.

    `perceptrons(x, expert_of_block, used)` maps `(blocks, size, d)` to the same shape; what the blocks behind the
    first `used` hold does not matter.
    """
    k, d = indices.shape[1], tokens.shape[1]
    to_slot, to_assignment, expert_of_block, used = _layout(indices, experts, size)
    repeated = ops.reshape(ops.repeat(tokens[:, None], k, axis=1), (-1, d))
    x = ops.reshape(moved(repeated, to_assignment, to_slot), (-1, size, d))
    y = ops.reshape(perceptrons(x, expert_of_block, used), (-1, d))
    y = ops.reshape(moved(y, to_slot, to_assignment), (-1, k, d))
    return ops.sum(y * ops.cast(weights, y.dtype)[..., None], axis=1)


def _block_size(tokens, k, experts):
    """A power of two: large blocks waste rows, small ones copy an expert's weights more often."""
    if tokens is None:
        return 32
    even = max(1, tokens * k // experts)
    size = 1
    while size < 128 and size * size < 4 * even:
        size *= 2
    return size


def _layout(indices, experts, size):
    """Where each assignment goes.

    Returns:
        `to_slot` `(s * k,)`, the row of the blocks that each assignment goes to, or their number for one to no
        expert, whose index is `experts`; `to_assignment`, of every
        row of the blocks, the assignment that is there, or s * k for none; `expert_of_block`; and how many
        blocks, the first ones, are in use.
    """
    expert = ops.cast(ops.reshape(indices, (-1,)), "int32")
    total = ops.shape(expert)[0]
    order = ops.cast(ops.argsort(expert), "int32")
    rank = ops.cast(ops.argsort(order), "int32")
    counts = ops.sum(ops.one_hot(expert, experts, dtype="int32"), axis=0)
    blocks = (counts + (size - 1)) // size
    block_end = ops.cumsum(blocks)
    first_row, first_rank = (block_end - blocks) * size, ops.cumsum(counts) - counts
    to_slot = ops.take(first_row, expert) + rank - ops.take(first_rank, expert)

    # No routing needs more: one block an assignment, or full blocks and one more for each expert.
    most = total // size + experts
    most = min(most, total) if isinstance(most, int) else ops.minimum(most, total)
    block = ops.arange(most, dtype="int32")
    expert_of_block = ops.sum(ops.cast(block[:, None] >= block_end[None], "int32"), axis=1)
    expert_of_block = ops.minimum(expert_of_block, experts - 1)
    expert_of_row = ops.repeat(expert_of_block, size)
    to_slot = ops.where(expert < experts, to_slot, most * size)
    place = ops.arange(most * size, dtype="int32") - ops.take(first_row, expert_of_row)
    filled = place < ops.take(counts, expert_of_row)
    sorted_place = ops.where(filled, ops.take(first_rank, expert_of_row) + place, 0)
    return to_slot, ops.where(filled, ops.take(order, sorted_place), total), expert_of_block, block_end[-1]


def _pick_forward(bank, expert_of_block):
    # The bank itself is kept for its number of experts alone.
    return ops.take(bank, expert_of_block, axis=0), (bank, expert_of_block)


def _pick_backward(residuals, gradient):
    bank, expert_of_block = residuals
    return ops.segment_sum(gradient, expert_of_block, num_segments=bank.shape[0]), None


_picked = _backend.autodiff.custom_gradient(_pick_forward, _pick_backward)

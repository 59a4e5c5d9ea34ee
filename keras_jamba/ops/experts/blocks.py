"""Tokens sorted by expert into blocks of one expert each: batched products of static shape.

Zero rows fill an expert's last block. The number of blocks suffices for any routing, so no token is dropped and no
shape depends on the routing.
"""

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops._repeat import repeated
from keras_jamba.ops.experts._moving import moved
from keras_jamba.ops.experts.dense import FEW, activation
from keras_jamba.ops.quantization import QuantizedTensor, picked


def why_not(call):
    if call.limited:
        return "it does not support capacity_factor"
    few_tokens = call.tokens is not None and call.tokens <= FEW
    if not _backend.compilation.has_jit() and not (few_tokens and call.is_quantized):
        return "on eager PyTorch, 'split' does the same without padding"
    if few_tokens and call.tokens * call.per_token >= call.experts or 2 * call.per_token >= call.experts:
        return "each token chooses at least half of the experts, or a few tokens choose all: 'dense' does no more work"
    return None


def run(tokens, weights, indices, up_bank, down_bank, gate_bank):
    def perceptrons(x, expert_of_block, used):
        def through(x, bank):
            is_quantized = isinstance(bank, QuantizedTensor)
            matrices = picked(bank, expert_of_block, x.dtype) if is_quantized else _picked(bank, expert_of_block)
            return ops.matmul(x, matrices)

        gate = None if gate_bank is None else through(x, gate_bank)
        return through(activation(through(x, up_bank), gate), down_bank)

    size = _block_size(tokens.shape[0], indices.shape[1], up_bank.shape[0])
    return through_blocks(perceptrons, size, tokens, weights, indices, up_bank.shape[0])


def through_blocks(perceptrons, size, tokens, weights, indices, experts):
    """Sorts tokens into blocks of `size` and returns the weighted sum of the outputs of `perceptrons`, `(s, d)`.

    `perceptrons(x, expert_of_block, used)` maps `(blocks, size, d)` to the same shape. The first `used` blocks hold
    tokens; the content of the others is ignored.
    """
    k, d = indices.shape[1], tokens.shape[1]
    to_slot, to_assignment, expert_of_block, used = _layout(indices, experts, size)
    x = ops.reshape(moved(repeated(tokens, k), to_assignment, to_slot), (-1, size, d))
    y = ops.reshape(perceptrons(x, expert_of_block, used), (-1, d))
    y = ops.reshape(moved(y, to_slot, to_assignment), (-1, k, d))
    return ops.sum(y * ops.cast(weights, y.dtype)[..., None], axis=1)


def _block_size(tokens, k, experts):
    """Returns a power of two: large blocks waste rows, small blocks copy an expert's weights more often."""
    if tokens is None:
        return 32
    even = max(1, tokens * k // experts)
    size = 1
    while size < 128 and size * size < 4 * even:
        size *= 2
    return size


def _layout(indices, experts, size):
    """Computes the place of each assignment in the blocks.

    The index `experts` means no expert.

    Returns:
        `(to_slot, to_assignment, expert_of_block, used)`:

        - `to_slot` `(s * k,)`: the row in the blocks of each assignment, or the number of rows for no expert.
        - `to_assignment`: the assignment of each row in the blocks, or s * k for none.
        - `expert_of_block`: the expert of each block.
        - `used`: the number of leading blocks that hold tokens.
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

    # The most that any routing needs: one block per assignment, or full blocks and one more per expert.
    most = total // size + experts
    most = min(most, total) if isinstance(most, int) else ops.minimum(most, total)
    block = ops.arange(most, dtype="int32")
    expert_of_block = ops.sum(ops.cast(block[:, None] >= block_end[None], "int32"), axis=1)
    expert_of_block = ops.minimum(expert_of_block, experts - 1)
    expert_of_row = repeated(expert_of_block, size)
    to_slot = ops.where(expert < experts, to_slot, most * size)
    place = ops.arange(most * size, dtype="int32") - ops.take(first_row, expert_of_row)
    occupied = place < ops.take(counts, expert_of_row)
    sorted_place = ops.where(occupied, ops.take(first_rank, expert_of_row) + place, 0)
    return to_slot, ops.where(occupied, ops.take(order, sorted_place), total), expert_of_block, block_end[-1]


def _pick_forward(bank, expert_of_block):
    # The bank itself is kept for its number of experts alone.
    return ops.take(bank, expert_of_block, axis=0), (bank, expert_of_block)


def _pick_backward(residuals, gradient):
    bank, expert_of_block = residuals
    return ops.segment_sum(gradient, expert_of_block, num_segments=bank.shape[0]), None


_picked = _backend.autodiff.custom_gradient(_pick_forward, _pick_backward)

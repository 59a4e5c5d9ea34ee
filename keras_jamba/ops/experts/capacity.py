"""The same number of rows per expert: batched products of static shape that drop assignments beyond the capacity."""

import math

from keras import ops

from keras_jamba.ops.experts._moving import moved
from keras_jamba.ops.experts.dense import activation


def why_not(call):
    return None if call.limited else "it drops tokens and requires a capacity_factor"


def run(tokens, weights, indices, up_bank, down_bank, gate_bank, capacity_factor, mask):
    experts, d = up_bank.shape[:2]
    k = indices.shape[1]
    capacity = _capacity(ops.shape(tokens)[0], k, experts, capacity_factor)
    to_slot, to_assignment, kept = _layout(indices, mask, experts, capacity)
    repeated = ops.tile(tokens, (k, 1))
    x = ops.reshape(moved(repeated, to_assignment, to_slot), (experts, capacity, d))
    gate = None if gate_bank is None else ops.matmul(x, gate_bank)
    y = ops.matmul(activation(ops.matmul(x, up_bank), gate), down_bank)
    y = ops.reshape(moved(ops.reshape(y, (-1, d)), to_slot, to_assignment), (k, -1, d))
    y = ops.sum(y * ops.cast(ops.transpose(weights), y.dtype)[..., None], axis=0)
    return y, ops.transpose(ops.reshape(kept, (k, -1)))


def _capacity(tokens, k, experts, factor):
    if isinstance(tokens, int):
        return min(tokens, max(1, math.ceil(tokens * k * factor / experts)))
    capacity = ops.cast(ops.ceil(ops.cast(tokens, "float32") * (k * factor / experts)), "int32")
    return ops.minimum(tokens, ops.maximum(capacity, 1))


def _layout(indices, mask, experts, capacity):
    """Computes the row of each assignment, all first choices before all second choices.

    Returns:
        `(to_slot, to_assignment, kept)`:

        - `to_slot` `(k * s,)`: the row of each assignment among `experts * capacity`, or one past the end.
        - `to_assignment`: the assignment of each row, or k * s for none.
        - `kept` `(k * s,)` bool: whether the assignment is within the capacity.
    """
    expert = ops.cast(ops.transpose(indices), "int32")
    if mask is not None:
        expert = ops.where(mask[None], expert, experts)
    expert = ops.reshape(expert, (-1,))
    total = ops.shape(expert)[0]
    # The index in the key makes the keys distinct, so the sort need not be stable.
    order = ops.cast(ops.argsort(expert * total + ops.arange(total, dtype="int32")), "int32")
    rank = ops.cast(ops.argsort(order), "int32")
    counts = ops.sum(ops.one_hot(expert, experts + 1, dtype="int32"), axis=0)
    first = ops.cumsum(counts) - counts
    place = rank - ops.take(first, expert)
    kept = ops.logical_and(place < capacity, expert < experts)
    to_slot = ops.where(kept, expert * capacity + place, experts * capacity)
    place = ops.tile(ops.arange(capacity, dtype="int32")[None], (experts, 1))
    occupied = ops.reshape(place < counts[:experts, None], (-1,))
    source = ops.reshape(first[:experts, None] + place, (-1,))
    source = ops.take(order, ops.where(occupied, source, 0))
    return to_slot, ops.where(occupied, source, total), kept

"""The same number of rows for every expert: batched products of static shape, which drop what finds no room."""

import math

from keras import ops

from keras_jamba.ops.experts._moving import moved
from keras_jamba.ops.experts.dense import activation


def why_not(call):
    return None if call.limited else "it drops tokens; ask for it with capacity_factor"


def run(tokens, weights, indices, up_bank, down_bank, gate_bank, capacity_factor, mask):
    experts, d = up_bank.shape[:2]
    k = indices.shape[1]
    room = _room(ops.shape(tokens)[0], k, experts, capacity_factor)
    to_slot, to_assignment, kept = _layout(indices, mask, experts, room)
    repeated = ops.tile(tokens, (k, 1))
    x = ops.reshape(moved(repeated, to_assignment, to_slot), (experts, room, d))
    gate = None if gate_bank is None else ops.matmul(x, gate_bank)
    y = ops.matmul(activation(ops.matmul(x, up_bank), gate), down_bank)
    y = ops.reshape(moved(ops.reshape(y, (-1, d)), to_slot, to_assignment), (k, -1, d))
    y = ops.sum(y * ops.cast(ops.transpose(weights), y.dtype)[..., None], axis=0)
    return y, ops.transpose(ops.reshape(kept, (k, -1)))


def _room(tokens, k, experts, factor):
    if isinstance(tokens, int):
        return min(tokens, max(1, math.ceil(tokens * k * factor / experts)))
    room = ops.cast(ops.ceil(ops.cast(tokens, "float32") * (k * factor / experts)), "int32")
    return ops.minimum(tokens, ops.maximum(room, 1))


def _layout(indices, mask, experts, room):
    """Where each assignment goes, all first choices before all second ones.

    Returns:
        `to_slot` `(k * s,)`, the row of the `(experts * room)` that each assignment goes to, or one past the
        end; `to_assignment`, of every row the assignment that is there, or k * s; `kept` `(k * s,)` bool.
    """
    expert = ops.cast(ops.transpose(indices), "int32")
    if mask is not None:
        expert = ops.where(mask[None], expert, experts)
    expert = ops.reshape(expert, (-1,))
    total = ops.shape(expert)[0]
    # The place as the last digits of the key makes any sort a stable one.
    order = ops.cast(ops.argsort(expert * total + ops.arange(total, dtype="int32")), "int32")
    rank = ops.cast(ops.argsort(order), "int32")
    counts = ops.sum(ops.one_hot(expert, experts + 1, dtype="int32"), axis=0)
    first = ops.cumsum(counts) - counts
    place = rank - ops.take(first, expert)
    kept = ops.logical_and(place < room, expert < experts)
    to_slot = ops.where(kept, expert * room + place, experts * room)
    place = ops.tile(ops.arange(room, dtype="int32")[None], (experts, 1))
    filled = ops.reshape(place < counts[:experts, None], (-1,))
    source = ops.reshape(first[:experts, None] + place, (-1,))
    source = ops.take(order, ops.where(filled, source, 0))
    return to_slot, ops.where(filled, source, total), kept

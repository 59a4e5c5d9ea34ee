"""Tokens sorted by expert, and the backend's grouped matrix product, for accelerators."""

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops.experts._sorting import in_one_dtype, sorted_by_expert, taken
from keras_jamba.ops.experts.dense import activation


def why_not(call):
    if call.limited:
        return "it does not support capacity_factor"
    if reason := _backend.numerics.why_no_grouped_matmul(call.platform, call.dtype, call.sizes):
        return reason
    return "it requires at least one token" if call.tokens == 0 else None


def run(tokens, weights, indices, up_bank, down_bank, gate_bank):
    dtype = tokens.dtype
    tokens, up_bank, down_bank, gate_bank = in_one_dtype(tokens, up_bank, down_bank, gate_bank)
    rows = sorted_by_expert(indices, up_bank.shape[0])
    through = lambda x, bank: _backend.numerics.grouped_matmul(x, bank, rows.counts)  # noqa: E731
    x = taken(tokens, rows.source, rows.place)
    gate = None if gate_bank is None else through(x, gate_bank)
    y = through(activation(through(x, up_bank), gate), down_bank)
    y = taken(y, ops.reshape(rows.place, (-1,)), rows.order[:, None])
    y = ops.reshape(y, (-1, indices.shape[1], y.shape[-1]))
    return ops.cast(ops.sum(y * ops.cast(weights, y.dtype)[..., None], axis=1), dtype)

"""Tokens sorted by expert and split: one matrix product per expert, for backends with dynamic shapes."""

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops.experts.dense import activation
from keras_jamba.ops.quantization import QuantizedTensor, picked


def why_not(call):
    if call.limited:
        return "it does not support capacity_factor"
    return _backend.tensors.why_no_split_rows()


def run(tokens, weights, indices, up_bank, down_bank, gate_bank):
    experts, k = up_bank.shape[0], indices.shape[1]
    expert = ops.reshape(indices, (-1,))
    order = ops.argsort(expert)
    counts = ops.sum(ops.one_hot(expert, experts, dtype="int32"), axis=0)
    rows = _backend.tensors.split_rows(ops.take(tokens, order // k, axis=0), counts)
    ups, downs, gates = (_one_by_one(bank, experts, tokens.dtype) for bank in (up_bank, down_bank, gate_bank))
    outputs = []
    for x, up, down, gate in zip(rows, ups, downs, gates, strict=True):
        hidden = activation(ops.matmul(x, up), None if gate is None else ops.matmul(x, gate))
        outputs.append(ops.matmul(hidden, down))
    y = ops.take(ops.concatenate(outputs), ops.argsort(order), axis=0)
    y = ops.reshape(y, (-1, k, y.shape[-1]))
    return ops.sum(y * ops.cast(weights, y.dtype)[..., None], axis=1)


def _one_by_one(bank, experts, dtype):
    if bank is None:
        return [None] * experts
    if isinstance(bank, QuantizedTensor):
        return (picked(bank, i, dtype) for i in range(experts))
    # Unstacked, because the gradient of every bank[i] would be as large as the bank.
    return ops.unstack(bank, experts)

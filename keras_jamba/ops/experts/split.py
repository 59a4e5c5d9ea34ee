"""Tokens sorted by expert and split: as many plain products as there are experts, for PyTorch's eager mode."""

import keras
from keras import ops

from keras_jamba.ops.experts.dense import activation


def why_not(call):
    if call.limited:
        return "it drops no token"
    if keras.backend.backend() != "torch":
        return "its shapes depend on the routing, which a compiler does not allow"
    return None


def run(tokens, weights, indices, up_bank, down_bank, gate_bank):
    experts, k = up_bank.shape[0], indices.shape[1]
    expert = indices.reshape(-1)
    order = expert.argsort(stable=True)
    counts = expert.bincount(minlength=experts).tolist()
    outputs = []
    for i, x in enumerate(tokens[order // k].split(counts)):
        if len(x):
            gate = None if gate_bank is None else x @ gate_bank[i]
            outputs.append(activation(x @ up_bank[i], gate) @ down_bank[i])
    y = ops.concatenate(outputs)[order.argsort()]
    return (y.reshape(-1, k, y.shape[-1]) * weights.to(y.dtype).unsqueeze(-1)).sum(1)

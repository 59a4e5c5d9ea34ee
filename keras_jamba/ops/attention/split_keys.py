"""Attention of a few queries in Triton, on a GPU: many programs share the keys, as in a step of generation."""

from keras_jamba import _backend
from keras_jamba._triton.split_keys import SPLIT_KEYS
from keras_jamba.ops.attention import _few_queries, dense

reach = dense.reach
run = _few_queries.runner(_backend.kernels.triton_op, SPLIT_KEYS)


def why_not(call):
    if call.platform != "gpu":
        return "it requires a GPU"
    if reason := _few_queries.why_not(call):
        return reason
    if not (call.batch and call.queries and call.keys):
        return "it requires static shapes, and at least one row, query and key"
    return _backend.kernels.why_no_triton_op((call.batch, call.queries, 1, call.width))

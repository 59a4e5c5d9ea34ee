"""Attention of a few queries in the C library, on a CPU: a step of generation reads its cache once, with all cores."""

from keras_jamba import _backend, _native
from keras_jamba.ops.attention import _few_queries, dense

reach = dense.reach
run = _few_queries.runner(_backend.kernels.c_kernel_op, _native.ATTENTION)


def why_not(call):
    if call.platform != "cpu":
        return "it requires a CPU"
    if reason := _few_queries.why_not(call):
        return reason
    return _native.why_not() or _backend.kernels.why_no_c_kernel((call.batch, call.queries, 1, call.width))

"""Attention of a few queries in the C library, on a CPU: a step of generation reads its cache once, with all cores."""

from keras import ops

from keras_jamba import _backend, _native
from keras_jamba.ops._implementations import in_short_or_single
from keras_jamba.ops.attention import dense
from keras_jamba.ops.attention._visibility import Rule, Tokens

# With more queries, the backend's matrix products are faster; with fewer keys, a call costs more than it saves.
FEW_QUERIES, FEWEST_KEYS = 16, 256
# Memory grows with queries times threads.
MOST_QUERIES, WIDEST = 256, 256
reach = dense.reach


def why_not(call):
    if call.platform != "cpu":
        return "it requires a CPU"
    if None in (call.queries, call.keys):
        return "the number of tokens is unknown while the graph is traced"
    if call.queries > (MOST_QUERIES if call.requested else FEW_QUERIES):
        return f"{call.queries} queries are too many"
    if call.keys < FEWEST_KEYS and not call.requested:
        return f"{call.keys} keys are too few"
    if call.width > WIDEST:
        return f"it supports heads of at most {WIDEST} channels"
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return f"it supports bfloat16, float16 and float32, not {call.dtype}"
    return _native.why_not() or _backend.kernels.why_no_c_kernel((call.batch, call.queries, 1, call.width))


def run(query, key, value, rule, of_query, of_key):
    tensors = [in_short_or_single(x) for x in (query, key, value)]
    tokens = [None if x is None else ops.cast(x, "int32") for x in (*of_query[:2], *of_key)]
    (y,) = _function((*tensors, *tokens), (int(rule.causal), rule.window or 0))
    return ops.cast(y, query.dtype)


def _portable(tensors, options):
    query, key, value, *tokens = tensors
    causal, window = options
    key, value = (ops.cast(x, query.dtype) for x in (key, value))
    of_query, of_key = Tokens(*tokens[:2]), Tokens(*tokens[2:])
    return (dense.run(query, key, value, Rule(bool(causal), window or None), of_query, of_key),)


_function = _backend.kernels.c_kernel_op(_native.ATTENTION, _portable)

"""Attention of few queries in a kernel without a gradient of its own: `dense` computes the gradient."""

from keras import ops

from keras_jamba.ops._implementations import in_short_or_single
from keras_jamba.ops.attention import dense
from keras_jamba.ops.attention._visibility import Rule, Tokens

# With more queries, matrix products of many rows are faster; with fewer keys, a call costs more than it saves.
FEW_QUERIES, FEWEST_KEYS = 16, 256
# Memory grows with queries.
MOST_QUERIES, WIDEST = 256, 256


def why_not(call):
    """Returns None, or the reason why the sizes or the dtype of a call do not suit such a kernel."""
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
    return None


def runner(make_op, kernel):
    """Returns `run` of an implementation, from `c_kernel_op` or `triton_op` and its kernel."""
    function = make_op(kernel, _portable)

    def run(query, key, value, rule, of_query, of_key):
        tensors = [in_short_or_single(x) for x in (query, key, value)]
        tokens = [None if x is None else ops.cast(x, "int32") for x in (*of_query[:2], *of_key)]
        (y,) = function((*tensors, *tokens), (int(rule.causal), rule.window or 0))
        return ops.cast(y, query.dtype)

    return run


def _portable(tensors, options):
    query, key, value, *tokens = tensors
    causal, window = options
    key, value = (ops.cast(x, query.dtype) for x in (key, value))
    of_query, of_key = Tokens(*tokens[:2]), Tokens(*tokens[2:])
    return (dense.run(query, key, value, Rule(bool(causal), window or None), of_query, of_key),)

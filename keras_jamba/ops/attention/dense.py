"""Attention over all pairs of tokens with a mask. Its memory is quadratic in tokens."""

from typing import NamedTuple

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops.attention import fused
from keras_jamba.ops.attention._visibility import Rule, Tokens, visible

# On a GPU, the mask and the scores of longer rows take gigabytes.
MOST_PAIRS = 8192 * 8192
_FEW_QUERIES = 16


def why_not(call):
    if call.platform == "gpu" and not call.requested and call.exceeds(MOST_PAIRS):
        return "it needs memory for all pairs of tokens"
    return None


def run(query, key, value, rule, of_query, of_key):
    seen = visible(rule, of_query, of_key)
    if _has_few_queries(query) and _backend.sharding.active_mesh() is None:
        outputs = _attention_of_few(query, key, value, seen)
    else:
        outputs = fused.run(query, key, value, mask=seen)
    # The softmax of a query that sees no key is meaningless.
    return ops.where(ops.expand_dims(ops.any(seen, axis=2), (2, 3)), outputs, ops.zeros_like(outputs))


def _has_few_queries(query):
    return isinstance(query.shape[1], int) and query.shape[1] <= _FEW_QUERIES


def _attention_of_few(query, key, value, seen):
    """Computes attention with the heads of a group as further queries: the backends would repeat all keys instead."""
    b, t, h, c = query.shape
    groups, repeats = key.shape[2], h // key.shape[2]
    query = ops.transpose(ops.reshape(query, (-1, t, groups, repeats, c)), (0, 3, 1, 2, 4))
    query = ops.reshape(query, (-1, repeats * t, groups, c))
    outputs = fused.run(query, key, value, mask=ops.tile(seen, (1, repeats, 1)))
    outputs = ops.transpose(ops.reshape(outputs, (-1, repeats, t, groups, c)), (0, 2, 3, 1, 4))
    return ops.reshape(outputs, (-1, t, h, c))


class Reach(NamedTuple):
    """Which queries see marked keys, and which keys marked queries see, for `isolated`."""

    rule: Rule

    @property
    def has_loops(self):
        return False

    def to_queries(self, of_key, tokens):
        return ops.any(ops.logical_and(self._visible(tokens), ops.expand_dims(of_key, 1)), axis=2)

    def to_keys(self, of_query, tokens):
        return ops.any(ops.logical_and(self._visible(tokens), ops.expand_dims(of_query, 2)), axis=1)

    def _visible(self, tokens):
        return visible(self.rule, Tokens(*tokens[:2]), Tokens(*tokens[2:]))


def reach(rule, of_query, of_key):
    """Returns the last two arguments of `isolated`."""
    return Reach(rule), [x for x in (*of_query, *of_key) if x is not None]

"""Selection of the implementation of attention, the isolation of damaged documents, and sharding."""

import dataclasses
import os

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba.ops._implementations import choose
from keras_jamba.ops._isolation import isolated
from keras_jamba.ops._sharding import shard_map, with_their_queries
from keras_jamba.ops.attention import blocks, dense, fused, native, split_keys, triton
from keras_jamba.ops.attention._visibility import Tokens

_FARTHEST = 2**31 - 1  # distances are int32
_FASTEST_FIRST = {
    "cpu": {"fused": fused, "native": native, "blocks": blocks, "dense": dense},
    # `dense` runs few queries to few keys. It refuses rows for which it needs gigabytes.
    "gpu": {"split_keys": split_keys, "fused": fused, "triton": triton, "dense": dense, "blocks": blocks},
    "tpu": {"fused": fused, "blocks": blocks, "dense": dense},
}


@dataclasses.dataclass(frozen=True)
class _Call:
    """Properties of a call that `why_not` reads.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        batch: the number of rows, None if unknown.
        queries, keys: the numbers of tokens, None if unknown.
        width, dtype: of a head.
        plain: whether there is one document, without padding, window and offset.
        requested: whether the caller named the implementation.
    """

    platform: str
    batch: int | None
    queries: int | None
    keys: int | None
    width: int
    dtype: str
    plain: bool = False
    requested: bool = False

    def exceeds(self, pairs):
        """Returns whether there are more pairs of queries and keys; False if their number is unknown."""
        return None not in (self.queries, self.keys) and self.queries * self.keys > pairs


def attention(query, key, value, rule, tokens, *, plain=False, isolate=False, requested=None):
    """Computes attention, with the arguments of `grouped_query_attention` as tensors.

    Args:
        query: `(b, t, h, c)`.
        key, value: `(b, s, g, c)`.
        rule: the `Rule` of `_visibility`.
        tokens: a function without arguments, which returns the `Tokens` of queries and keys. `fused` needs none.
        plain: whether every query sees all keys, or with a causal rule and s = t all keys up to its own.
        isolate: whether NaN and infinity must not reach tokens that do not see them.
        requested: the name of the implementation, or None.

    Returns:
        `(b, t, h, c)` in the dtype of `query`.
    """
    if rule.window is not None:
        rule = rule._replace(window=min(int(rule.window), _FARTHEST))
    requested = requested or os.environ.get("KERAS_JAMBA_ATTENTION") or None
    platform, dtype = _backend.tensors.platform(query), keras.backend.standardize_dtype(query.dtype)
    # Symbolic sizes count as unknown: a comparison would fix them.
    batch, queries, keys = (x if isinstance(x, int) else None for x in (*query.shape[:2], key.shape[1]))
    call = _Call(platform, batch, queries, keys, query.shape[3], dtype, plain, requested is not None)
    table = _FASTEST_FIRST[call.platform]
    if requested is None and all(module.why_not(call) for module in table.values()):
        call, requested = dataclasses.replace(call, requested=True), "dense"  # it needs memory, but can always run
    chosen = choose("grouped_query_attention", table, requested, call)
    if not _backend.tensors.has_values(query):
        return ops.zeros_like(query)
    if chosen is fused:
        return fused.run(query, key, value, rule.causal)
    of_query, of_key = (_with_lengths(*each) for each in zip(tokens(), (query, key), strict=True))
    in_kernels = isolate and chosen is triton
    attend = lambda *qkv: _on_shards(chosen, *qkv, rule, of_query, of_key, in_kernels)  # noqa: E731
    if in_kernels or not isolate:
        return attend(query, key, value)
    return isolated(attend, query, key, value, *chosen.reach(rule, of_query, of_key))


def implementations():
    """Returns `{name: None or reason}` for a long row of documents on this platform, fastest first."""
    call = _Call(_backend.tensors.platform(), batch=1, queries=4096, keys=4096, width=64, dtype=keras.config.floatx())
    return {name: module.why_not(call) for name, module in _FASTEST_FIRST[call.platform].items()}


def _with_lengths(tokens, x):
    """Returns `tokens` with the static shape of the tensor `x (b, t, ...)` that they belong to."""
    return Tokens(*(None if each is None else _backend.tensors.ensure_shape(each, x.shape[:2]) for each in tokens))


def _on_shards(chosen, query, key, value, rule, of_query, of_key, in_kernels):
    if chosen is dense:
        return dense.run(query, key, value, rule, of_query, of_key)
    query, key, value = with_their_queries(query, key, value)
    names = ("query_positions", "query_documents", "query_sinks", "key_positions", "key_documents", "key_sinks")
    tensors = dict(query=query, key=key, value=value) | dict(zip(names, (*of_query, *of_key), strict=True))

    def run(query, key, value, **tokens):
        tokens = [tokens[name] for name in names]
        more = {"isolate": True} if in_kernels else {}
        return (chosen.run(query, key, value, rule, Tokens(*tokens[:3]), Tokens(*tokens[3:]), **more),)

    letters = dict(query="bthc", key="bsgc", value="bsgc") | {name: "bt" if "query" in name else "bs" for name in names}
    return shard_map(run, tensors, letters, ("bthc",))[0]

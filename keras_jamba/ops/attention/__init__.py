"""Grouped-query attention: one function, several implementations."""

from numbers import Integral

from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Tensor
from keras_jamba.ops import _checks
from keras_jamba.ops._tokens import document_numbers, first_of_documents, zero_padding
from keras_jamba.ops.attention import _dispatch
from keras_jamba.ops.attention._visibility import Rule, keys, queries
from keras_jamba.ops.attention.weights import attention_weights, check_heads

__all__ = ["attention_implementations", "attention_weights", "grouped_query_attention"]


def grouped_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    *,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_segment_ids: Tensor | None = None,
    offset: Tensor | int = 0,
    window: int | None = None,
    sinks: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Computes scaled dot-product attention; query head i reads key-value head `i // (h / g)`.

    Without the arguments after `causal`, every query sees all keys, or with `causal` the keys up to its own position.
    NaN and infinity of a document never reach another document, in outputs and gradients.

    Args:
        query: `(b, t, h, c)`.
        key, value: `(b, s, g, c)`, h a multiple of g.
        causal: whether a query sees no later key.
        mask: `(b, t)` bool or None, False for padding among the queries, whose outputs are zeros. If s = t and there
            is no `key_mask`, it also hides the keys.
        segment_ids: `(b, t)` integers or None: the document of each query. A query sees only keys of its document.
            Without `key_segment_ids` they also are those of the keys, and a change of the id begins a document, so
            0 1 0 are three documents.
        key_mask: `(b, s)` bool or None, False for keys that no query sees, for example empty slots of a cache.
        key_segment_ids: `(b, s)` integers or None. Documents then are equal ids.
        offset: integer or `(b,)` integers, the position of the first query among the keys. Padding has no position.
        window: None, or the distance in tokens: a query sees only keys at a distance below it, on both sides unless
            `causal`.
        sinks: the number of first tokens per document that the window does not hide. Needs a window.
        implementation: None for the fastest that can run, or a name of `attention_implementations()`. If None, the
            environment variable `KERAS_JAMBA_ATTENTION` can name one.

    Returns:
        `(b, t, h, c)` in the dtype of `query`. Zeros for a query that sees no key.

    Raises:
        ValueError: if shapes do not match, a dtype is wrong, or the implementation is unknown or cannot run.

    Reference:
        [Ainslie et al. (2023)](https://arxiv.org/abs/2305.13245);
        the sinks: [Xiao et al. (2023)](https://arxiv.org/abs/2309.17453).
    """
    tensors = {"query": query, "key": key, "value": value}
    _checks.check_given(tensors, ("query", "key", "value"))
    tensors = {name: ops.convert_to_tensor(x) for name, x in tensors.items()}
    _checks.check_shapes(tensors, {"query": "bthc", "key": "bsgc", "value": "bsgc"})
    _checks.check_floating(tensors)
    query, key, value = tensors.values()
    check_heads(query, key)
    mask, segment_ids = _checks.check_tokens(mask, segment_ids, query.shape)
    key_mask, key_segment_ids = _checks.check_tokens(key_mask, key_segment_ids, key.shape)
    _checks.check_window(window, sinks)
    same = query.shape[1] == key.shape[1]
    if segment_ids is not None and key_segment_ids is None:
        _check_same(same, "segment_ids", "key_segment_ids", query, key)
        segment_ids = key_segment_ids = document_numbers(segment_ids, mask)
    elif key_segment_ids is not None:
        _check_ids(segment_ids, key_segment_ids)
    if mask is not None and key_mask is None and None in (query.shape[1], key.shape[1]) and not same:
        raise ValueError(
            "mask alone needs lengths that are both known or both unknown. Received: "
            f"query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}. Pass key_mask too."
        )
    key_mask = mask if key_mask is None and same else key_mask
    # Hidden tokens have the weight 0, and 0 times NaN is NaN.
    query, key, value = zero_padding(query, mask), zero_padding(key, key_mask), zero_padding(value, key_mask)
    isolate = segment_ids is not None or window is not None
    plain = (
        all(x is None for x in (mask, key_mask, segment_ids, window)) and isinstance(offset, Integral) and offset == 0
    )
    plain = plain and (same or not causal)
    offset = _offsets(offset, query)

    def tokens():
        documents = _documents(key_segment_ids, key)
        exempt = first_of_documents(document_numbers(documents, key_mask), key_mask, sinks) if sinks else None
        of_query = queries(offset + _positions(query, mask), _documents(segment_ids, query), mask)
        return of_query, keys(_positions(key, key_mask), documents, key_mask, exempt)

    rule = Rule(bool(causal), window)
    return _dispatch.attention(query, key, value, rule, tokens, plain=plain, isolate=isolate, requested=implementation)


def attention_implementations() -> dict[str, str | None]:
    """Returns the implementations of `grouped_query_attention` on this platform, fastest first.

    Returns:
        `{name: None, or the reason why the implementation cannot run}`, for a long row of packed documents.
    """
    return _dispatch.implementations()


def _positions(x, mask):
    """Returns `(b, t)` int32: the number of real tokens before each token of `x (b, t, ...)`."""
    batch, length = ops.shape(x)[:2]
    if mask is None:
        return ops.broadcast_to(ops.arange(length, dtype="int32")[None], (batch, length))
    real = ops.cast(mask, "int32")
    return ops.cumsum(real, axis=1) - real


def _documents(segment_ids, x):
    return ops.zeros(ops.shape(x)[:2], "int32") if segment_ids is None else segment_ids


def _offsets(offset, query):
    if isinstance(offset, Integral):
        return int(offset)
    offset = ops.convert_to_tensor(offset)
    _checks.check_shapes({"query": query, "offset": offset}, {"query": "bthc", "offset": "b"})
    return ops.cast(offset, "int32")[:, None]


def _check_ids(segment_ids, key_segment_ids):
    """Checks ids that mark hidden tokens, if the values are on the host."""
    if segment_ids is None:
        raise ValueError(
            "key_segment_ids need segment_ids, the documents of the queries. Received: segment_ids=None. Pass both."
        )
    for name, ids in (("segment_ids", segment_ids), ("key_segment_ids", key_segment_ids)):
        ids = _backend.tensors.concrete_numpy(ids)
        if ids is not None and ids.size and ids.min() < 2 - 2**31:
            raise ValueError(
                f"{name} beside key_segment_ids must be at least 2 - 2^31. Received: {ids.min()}. Number the documents "
                "of a row 0, 1, 2, ..."
            )


def _check_same(same, name, needed, query, key):
    if not same:
        raise ValueError(
            f"{name} alone need as many keys as queries. Received: query.shape={tuple(query.shape)}, "
            f"key.shape={tuple(key.shape)}. Pass {needed} too."
        )

"""Grouped-query attention, and its cache of keys and values."""

import keras
import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Tensor
from keras_jamba.ops import _checks
from keras_jamba.ops._isolation import isolated
from keras_jamba.ops._sharding import with_their_queries
from keras_jamba.ops._tokens import compaction, documents_of


def grouped_query_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Computes scaled dot-product attention; query head i reads key-value head `i // (h / g)`.

    `keras.ops.dot_product_attention` uses the backend's fused kernel if there is one.

    Args:
        query: `(b, t, h, c)`.
        key, value: `(b, s, g, c)`, h a multiple of g.
        causal: whether query i sees only keys 0 to i; requires s = t.
        mask: `(b, t, s)` bool or None, True where a query sees a key. A query that sees no key gets a finite but
            meaningless output. NaN and infinity reach only the queries that see them, and in the gradient only the
            keys and values that a damaged query sees.

    Returns:
        `(b, t, h, c)` in the dtype of `query`.

    Raises:
        ValueError: if the shapes do not match, or a dtype is not floating-point.

    Reference:
        [Ainslie et al. (2023)](https://arxiv.org/abs/2305.13245).
    """
    tensors = {"query": query, "key": key, "value": value} | ({} if mask is None else {"mask": mask})
    _checks.check_given(tensors, ("query", "key", "value"))
    tensors = {name: ops.convert_to_tensor(x) for name, x in tensors.items()}
    _checks.check_shapes(tensors, {"query": "bthc", "key": "bsgc", "value": "bsgc", "mask": "bts"})
    _checks.check_floating({name: tensors[name] for name in ("query", "key", "value")})
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    _check_heads(query, key)
    if mask is None:
        return _fused(query, key, value, None, causal)
    mask = ops.cast(tensors["mask"], "bool")
    visible = ops.logical_and(mask, _is_earlier(query, key)) if causal else mask
    return isolated(lambda q, k, v: _fused(q, k, v, mask, causal), query, key, value, visible)


def _is_earlier(query, key):
    """Returns `(t, s)` bool: whether a key does not come after a query."""
    return ops.arange(ops.shape(query)[1])[:, None] >= ops.arange(ops.shape(key)[1])[None, :]


def _fused(query, key, value, mask, causal=False):
    """Returns the attention of the backend's fused kernel; `mask` `(b, t, s)` bool or None."""
    mask = None if mask is None else mask[:, None]
    query, key, value = with_their_queries(query, key, value)
    if key.shape[2] == 1:
        # On TensorFlow, keras.ops.dot_product_attention repeats a single key-value head wrongly.
        key, value = (ops.repeat(x, query.shape[2], axis=2) for x in (key, value))
    dtype = keras.backend.standardize_dtype(query.dtype)
    if dtype == "float16" and _backend.tensors.platform() == "cpu":
        # XLA on a CPU: "The precision 'F16_F16_F32' is not supported by dot_general".
        query, key, value = (ops.cast(x, "float32") for x in (query, key, value))
    return ops.cast(ops.dot_product_attention(query, key, value, mask=mask, is_causal=causal), dtype)


def attention_weights(query: Tensor, key: Tensor, causal: bool = False, window: int | None = None) -> Tensor:
    """Computes the softmax of `grouped_query_attention`: the weight of each value per query, O(t^2) in memory.

    Args:
        query: `(b, t, h, c)`.
        key: `(b, t, g, c)`, h a multiple of g; query head i reads key-value head `i // (h / g)`.
        causal: whether token i sees only tokens 0 to i.
        window: None, or the window in tokens: a token sees tokens at a distance below `window`, only earlier ones if
            causal.

    Returns:
        `(b, h, t, t)` float32, queries before keys. Every row sums to 1; the weight of an invisible key is exactly 0.

    Raises:
        ValueError: if the shapes do not match.

    Reference:
        [Vaswani et al. (2017)](https://arxiv.org/abs/1706.03762), section 3.2.1.
    """
    tensors = {"query": ops.convert_to_tensor(query), "key": ops.convert_to_tensor(key)}
    _checks.check_shapes(tensors, {"query": "bthc", "key": "btgc"})
    query, key = (ops.cast(x, "float32") for x in tensors.values())
    _check_heads(query, key)
    key = ops.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scores = ops.einsum("bthc,bshc->bhts", query, key) / query.shape[3] ** 0.5
    places = ops.arange(ops.shape(query)[1], dtype="int32")
    distance = places[:, None] - places[None, :]
    if causal:
        scores = ops.where(distance >= 0, scores, -np.inf)
    if window is not None:
        scores = ops.where(ops.abs(distance) < window, scores, -np.inf)
    return ops.softmax(scores, axis=-1)


def _check_heads(query, key):
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            "The number of query heads must be a multiple of the number of key-value heads. Received: "
            f"{query.shape[2]} and {key.shape[2]}. Repeat or drop heads."
        )


class CachedTokens:
    """Positions and documents of new tokens after the tokens that a cache of keys and values has seen.

    The cache is a ring buffer: slot `p % capacity` holds the token at position p, so the cache holds the newest
    `capacity` tokens. Padding has no position and no slot.

    Args:
        mask, segment_ids, reset_mask: `(b, t)` of the new tokens, or None; as in `MambaLayer`.
        length: `(b,)` int32, the number of tokens that the cache has seen per row.
        start: `(b,)` int32, the position at which the cache's last document began.
        document: `(b,)` int32, the id of that document.
        shape: `(b, t)` of the new tokens.
    """

    def __init__(self, mask, segment_ids, reset_mask, length, start, document, shape):
        batch, tokens = shape
        self.length, self.start, self.document = length, start, document
        self.documents = documents_of(segment_ids, reset_mask, mask, document)
        if self.documents is not None:
            # A new document does not see the cache.
            self.start = ops.where(self.documents.continues, start, length)
        self.padded = mask is not None
        self.mask = mask if self.padded else ops.ones((batch, tokens), "bool")
        self.order, self.rank = compaction(self.mask)
        self.count = ops.sum(ops.cast(self.mask, "int32"), axis=1)
        self.positions = length[:, None] + self.rank

    def fits(self, capacity):
        """Returns `(b,)` bool: whether a cache without a window can hold each row's last document.

        Raises:
            ValueError: if the lengths are on the host and a document exceeds the capacity.
        """
        end, start, _ = self.next_counts()
        needed = _backend.tensors.concrete_numpy(end - start)
        if needed is not None and needed.max() > capacity:
            raise ValueError(
                f"A cache must hold all tokens of a document, or a complete window. Received: a capacity of {capacity} "
                f"tokens, {needed.max()} needed. Create it with a larger max_length, or set attention_window."
            )
        return end - start <= capacity

    def attend(self, query, key, value, buffers=None, window=None, causal=True):
        """Computes attention of the new tokens to each other and to the tokens of the cache.

        Args:
            query: `(b, t, h, c)`.
            key, value: `(b, t, g, c)`.
            buffers: the cache's keys and values, `(b, s, g, c)` each, or None.
            window: None, or the window in tokens: a token sees tokens at a distance below `window`.
            causal: whether a token sees only itself and earlier tokens.

        Returns:
            `(b, t, h, c)`.
        """
        if window is not None and query.shape[1] is not None and query.shape[1] > window:
            return self._attend_in_blocks(query, key, value, buffers, window, causal)
        capacity = 0
        if buffers is not None:
            capacity = ops.shape(buffers[0])[1]
            key, value = (ops.concatenate(pair, axis=1) for pair in zip(buffers, (key, value), strict=True))
        return self._mixed(query, key, value, self._visible(capacity, window, causal))

    def _mixed(self, query, key, value, visible):
        """Returns attention among the `visible` `(b, t, s)` tokens, with damage only in its document."""
        if self.documents is None:
            # Invisible tokens are padding and empty slots, zeros.
            return _fused(query, key, value, visible)
        return grouped_query_attention(query, key, value, mask=visible)

    def _visible(self, capacity, window, causal):
        """Returns `(b, t, capacity + t)` bool: True where a new token sees a cache slot or a new token."""
        old = _slot_positions(self.length, capacity)
        documents = ops.logical_and(old >= 0, old >= self.start[:, None])[:, None, :]
        here = self.mask[:, None, :]
        if self.documents is not None:
            numbers = self.documents.numbers
            documents = ops.logical_and(documents, ops.equal(numbers, 0)[:, :, None])
            here = ops.logical_and(here, ops.equal(numbers[:, :, None], numbers[:, None, :]))
        documents, here = (ops.broadcast_to(x, (*ops.shape(self.mask), ops.shape(x)[2])) for x in (documents, here))
        allowed = ops.concatenate([documents, here], axis=2)
        distance = self.positions[:, :, None] - ops.concatenate([old, self.positions], axis=1)[:, None, :]
        if causal:
            allowed = ops.logical_and(allowed, distance >= 0)
        return allowed if window is None else ops.logical_and(allowed, ops.abs(distance) < window)

    def _attend_in_blocks(self, query, key, value, buffers, window, causal):
        """Computes `attend` in blocks of `window` tokens that see only neighbouring blocks: O(t * window)."""
        length = query.shape[1]
        blocks, sides = -(-length // window), 1 if causal else 2
        # One sequence without padding: a window of history, the new tokens, and zeros that fill the last block.
        line = self._line(key, value, self._history(buffers, window, key))
        line = {name: _filled(x, (blocks + sides - 1) * window - length) for name, x in line.items()}
        nearby = {name: _neighbours(x, blocks, window, 1 + sides) for name, x in line.items()}
        distance = window + np.arange(window)[:, None] - np.arange((1 + sides) * window)
        near = (np.abs(distance) < window) & ((distance >= 0) | (not causal))
        allowed = ops.logical_and(near[None], nearby["real"][:, None, :])
        if self.documents is not None:
            own = ops.reshape(line["document"][:, window : (1 + blocks) * window], (-1, window))
            allowed = ops.logical_and(allowed, ops.equal(own[:, :, None], nearby["document"][:, None, :]))
        query = _filled(self._packed(query), blocks * window - length)
        shape = ops.shape(query)
        query = ops.reshape(query, (-1, window, *shape[2:]))
        mixed = self._mixed(query, nearby["key"], nearby["value"], allowed)
        mixed = ops.reshape(mixed, (-1, *shape[1:]))
        return ops.take_along_axis(mixed, self.rank[:, :, None, None], axis=1) if self.padded else mixed[:, :length]

    def _line(self, key, value, history):
        """Returns the history and then the new tokens, packed: `"key"`, `"value"`, `"real"` and `"document"`."""
        new = dict(key=self._packed(key), value=self._packed(value))
        new["real"] = ops.arange(key.shape[1], dtype="int32")[None] < self.count[:, None]
        if self.documents is not None:
            # The history belongs to the first document, number 0.
            new["document"] = self._packed(self.documents.numbers)
            history = history | {"document": ops.zeros_like(history["real"], "int32")}
        return {name: ops.concatenate([history[name], x], axis=1) for name, x in new.items()}

    def _history(self, buffers, window, like):
        """Returns `"key"` and `"value"` of the `window` tokens before the new ones, and their visibility, `"real"`."""
        positions = self.length[:, None] - window + ops.arange(window, dtype="int32")[None]
        if buffers is None:
            nothing = ops.zeros((ops.shape(like)[0], window, *like.shape[2:]), like.dtype)
            return dict(key=nothing, value=nothing, real=ops.zeros_like(positions, "bool"))
        capacity = ops.shape(buffers[0])[1]
        slots = ops.mod(ops.maximum(positions, 0), capacity)[:, :, None, None]
        there = ops.logical_and(positions >= self.start[:, None], positions >= self.length[:, None] - capacity)
        key, value = (ops.take_along_axis(x, slots, axis=1) for x in buffers)
        return dict(key=key, value=value, real=there)

    def _packed(self, x):
        """Returns `x (b, t, ...)` with the real tokens of each row first."""
        if not self.padded:
            return x
        order = ops.reshape(self.order, (*ops.shape(self.order), *(1 for _ in x.shape[2:])))
        return ops.take_along_axis(x, order, axis=1)

    def written(self, buffer, new, capacity, start):
        """Returns the cache `(b, capacity, g, c)` after the new tokens, with zeros for tokens of earlier documents.

        Args:
            buffer: `(b, s, g, c)`, the slots before, or None.
            new: `(b, t, g, c)`, keys or values of the new tokens.
            capacity: the number of slots to return.
            start: `(b,)` int32, the position at which the last document begins, from `next_counts`.
        """
        slots = _slot_positions(self.length + self.count, capacity)
        index = slots - self.length[:, None]
        fresh = ops.take_along_axis(self.order, ops.clip(index, 0, ops.shape(new)[1] - 1), axis=1)
        values = ops.take_along_axis(new, fresh[:, :, None, None], axis=1)
        if buffer is not None:
            kept = ops.mod(ops.maximum(slots, 0), buffer.shape[1])
            kept = ops.take_along_axis(buffer, kept[:, :, None, None], axis=1)
            values = ops.where((index >= 0)[:, :, None, None], values, kept)
        there = ops.logical_and(slots >= 0, slots >= start[:, None])
        return ops.where(there[:, :, None, None], values, 0.0)

    def next_counts(self):
        """Returns `length`, `start` and `document` after the new tokens."""
        end, documents = self.length + self.count, self.documents
        if documents is None:
            return end, self.start, self.document
        numbers = ops.where(self.mask, documents.numbers, -1)
        newest = ops.max(numbers, axis=1, keepdims=True)
        begin = ops.min(ops.where(ops.equal(numbers, newest), self.positions, end[:, None]), axis=1)
        start = ops.where(newest[:, 0] <= 0, self.start, begin)
        if documents.cleared is not None:
            start = ops.where(documents.cleared, end, start)
        return end, start, documents.last


def resized(buffer, length, capacity):
    """Returns the newest tokens of the cache `buffer (b, s, g, c)`, moved to `capacity` slots.

    `length` `(b,)` is the number of tokens that each row has seen.
    """
    slots = _slot_positions(length, capacity)
    values = ops.take_along_axis(buffer, ops.mod(ops.maximum(slots, 0), buffer.shape[1])[:, :, None, None], axis=1)
    there = ops.logical_and(slots >= 0, slots >= length[:, None] - buffer.shape[1])
    return ops.where(there[:, :, None, None], values, 0.0)


def _filled(x, count):
    """Returns `x (b, t, ...)` with `count` zero tokens appended."""
    return ops.pad(x, [(0, count) if axis == 1 else (0, 0) for axis in range(len(x.shape))])


def _neighbours(x, blocks, size, count):
    """Returns `(b * blocks, count * size, ...)`: each block of `size` tokens with the `count - 1` blocks after it.

    `x` has the shape `(b, (blocks + count - 1) * size, ...)`.
    """
    x = ops.reshape(x, (-1, blocks + count - 1, size, *x.shape[2:]))
    x = ops.concatenate([x[:, i : i + blocks] for i in range(count)], axis=2)
    return ops.reshape(x, (-1, count * size, *x.shape[3:]))


def _slot_positions(length, capacity):
    """Returns `(b, capacity)` int32: the newest position below `length` in each slot; negative for empty slots."""
    slot = ops.arange(capacity, dtype="int32")[None]
    newest = length[:, None] - 1
    return newest - ops.mod(newest - slot, ops.maximum(capacity, 1))

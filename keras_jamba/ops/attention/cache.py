"""New tokens after a cache of keys and values: their positions, their attention and the cache after them."""

import functools

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops._tokens import compaction, documents_of, first_of_documents
from keras_jamba.ops.attention import _dispatch
from keras_jamba.ops.attention._visibility import Rule, Tokens, keys, queries


class CachedTokens:
    """Positions and documents of new tokens after the tokens that a cache of keys and values has seen.

    The first `num_sinks` slots of the cache hold the first tokens of the last document. The other slots are a ring
    buffer: slot `num_sinks + p % (capacity - num_sinks)` holds the token at position p, so the ring holds the newest
    tokens. Padding has no position and no slot.

    Args:
        mask, segment_ids, reset_mask: `(b, t)` of the new tokens, or None; as in `MambaLayer`.
        length: `(b,)` int32, the number of tokens that the cache has seen per row.
        start: `(b,)` int32, the position at which the cache's last document began.
        document: `(b,)` int32, the id of that document.
        shape: `(b, t)` of the new tokens.
        num_sinks: the number of first tokens per document that the window does not hide.
    """

    def __init__(self, mask, segment_ids, reset_mask, length, start, document, shape, num_sinks=0):
        batch, tokens = shape
        self.length, self.start, self.document, self.num_sinks = length, start, document, num_sinks
        self.documents = documents_of(segment_ids, reset_mask, mask, document)
        if self.documents is not None:
            # A new document does not see the cache.
            self.start = ops.where(self.documents.continues, start, length)
        self.padded = mask is not None
        self.mask = mask if self.padded else ops.ones((batch, tokens), "bool")
        self.order, self.rank = compaction(self.mask)
        self._slots_by_capacity = {}
        self.count = ops.sum(ops.cast(self.mask, "int32"), axis=1)
        self.positions = length[:, None] + self.rank
        # The id of each token's document in this call; 0 is the document of the cache, if it continues.
        self.numbers = ops.zeros((batch, tokens), "int32") if self.documents is None else self.documents.numbers

    def fits(self, capacity):
        """Returns `(b,)` bool: whether a cache without a window can hold each row's last document.

        Raises:
            ValueError: if the lengths are on the host and a document exceeds the capacity.
        """
        end, start, _ = self.next_counts
        held = end - start
        needed = _backend.tensors.concrete_numpy(held)
        if needed is not None and needed.max() > capacity:
            raise ValueError(
                f"A cache must hold all tokens of a document, or a complete window. Received: a capacity of {capacity} "
                f"tokens, {needed.max()} needed. Create it with a larger max_length, or set attention_window."
            )
        return held <= capacity

    def attend(self, query, key, value, buffers=None, window=None, causal=True):
        """Computes attention of the new tokens to each other and to the tokens of the cache.

        Args:
            query: `(b, t, h, c)`.
            key, value: `(b, t, g, c)`.
            buffers: the cache's keys and values before the new tokens, `(b, s, g, c)` each, or None.
            window: None, or the window in tokens: a token sees tokens at a distance below `window`.
            causal: whether a token sees only itself and earlier tokens.

        Returns:
            `(b, t, h, c)`.
        """
        of_key = self._new_keys()
        if buffers is not None:
            of_key = _joined(self._slots(ops.shape(buffers[0])[1], self.length, self.start), of_key)
            key, value = (ops.concatenate(pair, axis=1) for pair in zip(buffers, (key, value), strict=True))
        return self._attention(query, key, value, Rule(causal, window), of_key)

    def can_attend_to_written(self, window):
        """Returns whether `attend_to_written` equals `attend`: writing the new tokens hides no token they see."""
        return self.positions.shape[1] == 1 or (self.documents is None and window is None)

    def attend_to_written(self, query, buffers, window=None):
        """Computes `attend` from the cache after the new tokens, `(b, s, g, c)` each, without a copy of it."""
        end, start, _ = self.next_counts
        of_key = self._slots(ops.shape(buffers[0])[1], end, start)
        # One token may begin the document number 1. Then the cache holds it alone.
        alone = self.positions.shape[1] == 1
        return self._attention(query, *buffers, Rule(True, window), of_key, alone)

    def _attention(self, query, key, value, rule, of_key, one_document=False):
        numbers = ops.zeros(ops.shape(self.numbers), "int32") if one_document else self.numbers
        of_query = queries(self.positions, numbers, self.mask if self.padded else None)
        # Without documents and windows, hidden tokens are padding and empty slots, zeros.
        isolate = (self.documents is not None or rule.window is not None) and not one_document
        return _dispatch.attention(query, key, value, rule, lambda: (of_query, of_key), isolate=isolate)

    def _new_keys(self):
        return keys(self.positions, self.numbers, self.mask if self.padded else None, self._new_sinks())

    def _new_sinks(self):
        """Returns `(b, t)` bool: whether each token is among the first `num_sinks` of its document; None without."""
        if not self.num_sinks:
            return None
        first = self.positions - self.start[:, None] < self.num_sinks
        if self.documents is None:
            return first
        of_new = first_of_documents(self.numbers, self.mask if self.padded else None, self.num_sinks)
        return ops.where(self.numbers > 0, of_new, first)

    def _slots(self, capacity, length, start):
        """Returns the `Tokens` of a cache's slots."""
        positions = slot_positions(length, start, capacity, self.num_sinks)
        there = ops.logical_and(positions >= 0, positions >= start[:, None])
        sinks = None
        if self.num_sinks:
            sinks = ops.broadcast_to(ops.arange(capacity)[None] < self.num_sinks, ops.shape(positions))
        return keys(positions, ops.zeros(ops.shape(positions), "int32"), there, sinks)

    def written(self, buffer, new, capacity):
        """Returns the cache `(b, capacity, g, c)` after the new tokens, with zeros for tokens of earlier documents.

        Args:
            buffer: `(b, s, g, c)`, the slots before, or None.
            new: `(b, t, g, c)`, keys or values of the new tokens.
            capacity: the number of slots to return.
        """
        end, start, _ = self.next_counts
        ring = capacity - self.num_sinks
        fits = isinstance(new.shape[1], int) and isinstance(ring, int) and new.shape[1] <= ring
        if buffer is not None and buffer.shape[1] == capacity and fits:
            written = self._overwritten(buffer, new)
            if self.documents is None:
                return written
            slots = slot_positions(end, start, capacity, self.num_sinks)
        else:
            slots = slot_positions(end, start, capacity, self.num_sinks)
            written = self._gathered(buffer, new, slots)
        there = ops.logical_and(slots >= 0, slots >= start[:, None])
        return ops.where(ops.expand_dims(there, (2, 3)), written, ops.zeros_like(written))

    def _overwritten(self, buffer, new):
        """Returns `buffer` with the new tokens in their slots, which are distinct."""
        batch, tokens = ops.shape(new)[:2]
        slots, index = self._new_slots(buffer.shape[1])
        if self.padded:
            # The last slots keep their tokens.
            old = _backend.tensors.take_tokens(buffer, slots)
            real = ops.arange(tokens, dtype="int32")[None] < self.count[:, None]
            new = ops.where(ops.expand_dims(real, (2, 3)), _backend.tensors.take_tokens(new, self.order), old)
        return _backend.tensors.scatter_update(buffer, index, ops.reshape(new, (-1, *new.shape[2:])))

    def _new_slots(self, capacity):
        """Returns the slots `(b, t)` of the new tokens, and their indices `(b * t, 2)` in a cache."""
        if capacity not in self._slots_by_capacity:
            batch, tokens = ops.shape(self.positions)
            ring, start = capacity - self.num_sinks, self.next_counts[1]
            positions = self.length[:, None] + ops.arange(tokens, dtype="int32")[None]
            slots = ops.mod(positions, ring)
            if self.num_sinks:
                age = positions - start[:, None]
                slots = ops.where(ops.logical_and(age >= 0, age < self.num_sinks), age, self.num_sinks + slots)
            rows = ops.broadcast_to(ops.arange(batch, dtype="int32")[:, None], (batch, tokens))
            index = ops.reshape(ops.stack([rows, slots], axis=-1), (-1, 2))
            self._slots_by_capacity[capacity] = slots, index
        return self._slots_by_capacity[capacity]

    def _gathered(self, buffer, new, slots):
        """Returns the tokens at the positions `slots` `(b, capacity)`, each from `buffer` or from `new`."""
        index = slots - self.length[:, None]
        # No slot is newer than the last new token. An upper bound would fix an open length in `torch.export`.
        fresh = _backend.tensors.take_tokens(self.order, ops.maximum(index, 0))
        values = _backend.tensors.take_tokens(new, fresh)
        if buffer is None:
            return values
        kept = _from_ring(buffer, slots, self.num_sinks)
        return ops.where(ops.expand_dims(index >= 0, (2, 3)), values, kept)

    @functools.cached_property
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


def resized(buffer, length, start, capacity, num_sinks=0):
    """Returns the newest tokens of the cache `buffer (b, s, g, c)`, moved to `capacity` slots.

    `length` and `start`, `(b,)` each, are those of the cache.
    """
    slots = slot_positions(length, start, capacity, num_sinks)
    held = slot_positions(length, start, buffer.shape[1], num_sinks)
    oldest = ops.min(ops.where(held[:, num_sinks:] >= 0, held[:, num_sinks:], length[:, None]), axis=1)
    is_sink = ops.arange(capacity)[None] < num_sinks
    there = ops.logical_and(slots >= 0, ops.logical_or(is_sink, slots >= oldest[:, None]))
    values = _from_ring(buffer, slots, num_sinks)
    return ops.where(ops.expand_dims(there, (2, 3)), values, ops.zeros_like(values))


def _from_ring(buffer, slots, num_sinks):
    """Returns the tokens of a cache at the positions `slots` `(b, capacity)`, in that order; anything for negative."""
    places = num_sinks + ops.mod(ops.maximum(slots, 0), ops.maximum(ops.shape(buffer)[1] - num_sinks, 1))
    if num_sinks:
        place = ops.broadcast_to(ops.arange(ops.shape(slots)[1], dtype="int32")[None], ops.shape(slots))
        places = ops.where(place < num_sinks, place, places)
    return _backend.tensors.take_tokens(buffer, places)


def slot_positions(length, start, capacity, num_sinks=0):
    """Returns `(b, capacity)` int32: the position in each slot of a cache; negative for empty slots.

    A slot of the ring is empty if its token is in a sink.
    """
    slot = ops.arange(capacity - num_sinks, dtype="int32")[None]
    newest = length[:, None] - 1
    ring = newest - ops.mod(newest - slot, ops.maximum(capacity - num_sinks, 1))
    if not num_sinks:
        return ring
    ring = ops.where(ring >= start[:, None] + num_sinks, ring, -1)
    sinks = start[:, None] + ops.arange(num_sinks, dtype="int32")[None]
    return ops.concatenate([ops.where(sinks < length[:, None], sinks, -1), ring], axis=1)


def _joined(first, second):
    """Returns `Tokens` one after the other."""
    pairs = zip(first, second, strict=True)
    return Tokens(*(None if a is None else ops.concatenate([a, b], axis=1) for a, b in pairs))

"""Which keys each query sees, in memory linear in tokens."""

from typing import Any, NamedTuple

from keras import ops

from keras_jamba import _backend

# Document of a key that no query sees, and of a query that sees no key. Both are below all document numbers.
_HIDDEN_KEY, _BLIND_QUERY = -(2**31), 1 - 2**31
_FAR = 2**31 - 1


class Rule(NamedTuple):
    """The static part of a visibility.

    Attributes:
        causal: whether a query sees no key at a later position.
        window: None, or the distance of positions below which a query sees a key.
    """

    causal: bool
    window: int | None


class Tokens(NamedTuple):
    """Positions and documents of queries or keys.

    Attributes:
        positions: `(b, t)` int32.
        documents: `(b, t)` int32. A query sees keys of its own document only.
        sinks: None, or `(b, t)` int32, 1 for keys that the window does not hide. Always None for queries.
    """

    positions: Any
    documents: Any
    sinks: Any = None


def queries(positions, documents, mask):
    """Returns the `Tokens` of queries; where `mask` `(b, t)` bool is False they see no key."""
    return Tokens(positions, documents if mask is None else ops.where(mask, documents, _BLIND_QUERY))


def keys(positions, documents, mask, sinks=None):
    """Returns the `Tokens` of keys; where `mask` `(b, s)` bool is False no query sees them."""
    documents = documents if mask is None else ops.where(mask, documents, _HIDDEN_KEY)
    return Tokens(positions, documents, None if sinks is None else ops.cast(sinks, "int32"))


def padded(tokens, count, is_key):
    """Returns `tokens` with `count` more that see nothing and that nothing sees."""
    wide = lambda x, value=0: ops.pad(x, [(0, 0), (0, count)], constant_values=value)  # noqa: E731
    documents = wide(tokens.documents, _HIDDEN_KEY if is_key else _BLIND_QUERY)
    return Tokens(wide(tokens.positions), documents, None if tokens.sinks is None else wide(tokens.sinks))


def visible(rule, query, key):
    """Returns `(b, t, s)` bool: whether each query sees each key."""
    seen = ops.equal(ops.expand_dims(query.documents, 2), ops.expand_dims(key.documents, 1))
    if not rule.causal and rule.window is None:
        return seen
    of_query, of_key = ops.expand_dims(query.positions, 2), ops.expand_dims(key.positions, 1)
    if rule.window is not None:
        # Not a difference of positions: LiteRT writes it over the positions, which are read again.
        near = ops.expand_dims(_minus(query.positions, rule.window), 2) < of_key
        if not rule.causal:
            near = ops.logical_and(near, ops.expand_dims(_minus(key.positions, rule.window), 1) < of_query)
        if key.sinks is not None:
            near = ops.logical_or(near, ops.expand_dims(key.sinks > 0, 1))
        seen = ops.logical_and(seen, near)
    return ops.logical_and(seen, of_query >= of_key) if rule.causal else seen


def _minus(positions, window):
    """Returns `positions - window`, or the least int32 above -2^31 where that would overflow."""
    least = window - 2**31 + 1
    return (positions if window < 2**30 else ops.maximum(positions, least)) - window


def block_overlap(rule, query, key, query_size, key_size):
    """Returns `(b, query blocks, key blocks)` bool, False for pairs of blocks in which no query sees a key.

    Args:
        rule, query, key: the visibility; the numbers of tokens are multiples of the block sizes.
        query_size, key_size: tokens per block.
    """
    of_query, of_key = _extremes(query, query_size, _BLIND_QUERY), _extremes(key, key_size, _HIDDEN_KEY)
    low, high, early, late = (ops.expand_dims(x, 2) for x in of_query)
    key_low, key_high, key_early, key_late = (ops.expand_dims(x, 1) for x in of_key)
    overlap = ops.logical_and(high >= key_low, low <= key_high)
    if rule.window is not None:
        # Differences of blocks without a token overflow. No document overlaps with theirs.
        near = early - key_late < rule.window
        if not rule.causal:
            near = ops.logical_and(near, key_early - late < rule.window)
        if key.sinks is not None:
            sinks = ops.max(_in_blocks(key.sinks, key_size), axis=2)
            near = ops.logical_or(near, ops.expand_dims(sinks > 0, 1))
        overlap = ops.logical_and(overlap, near)
    return ops.logical_and(overlap, late >= key_early) if rule.causal else overlap


def block_lists(overlap):
    """Returns the places of True in each row of a bool tensor `(..., n)`.

    Returns:
        `(places, count)`: `(..., n)` int32, of which the first `count` `(...)` are those places in ascending order.
    """
    n = overlap.shape[-1]
    place = ops.arange(n, dtype="int32")
    places = _backend.tensors.argsort(ops.where(overlap, place, place + n))
    return places, ops.sum(ops.cast(overlap, "int32"), axis=-1)


def _extremes(tokens, size, hidden):
    """Returns the least and greatest document and position of each block, `(b, blocks)`, hidden tokens left out."""
    shown = _in_blocks(ops.not_equal(tokens.documents, hidden), size)
    found = []
    for x in (tokens.documents, tokens.positions):
        x = _in_blocks(x, size)
        found.append(ops.min(ops.where(shown, x, _FAR), axis=2))
        found.append(ops.max(ops.where(shown, x, -_FAR), axis=2))
    return found


def _in_blocks(x, size):
    return ops.reshape(x, (-1, x.shape[1] // size, size))

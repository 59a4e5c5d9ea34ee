"""Which tokens of a batch of sequences are real, and which documents they belong to."""

from keras import ops


def compaction(mask):
    """Where the real tokens of each row are.

    Args:
        mask: `(b, t)` bool, True for real tokens.

    Returns:
        `(order, rank)`, both `(b, t)` int32: the indices of the real tokens in order and then those of the
        others, and for each token the number of real tokens before it.
    """
    length = ops.shape(mask)[1]
    index = ops.arange(length, dtype="int32")[None]
    real = ops.cast(mask, "int32")
    # Keys that differ from each other: no sort needs to be stable.
    order = ops.argsort((1 - real) * length + index, axis=1)
    return ops.cast(order, "int32"), ops.cumsum(real, axis=1) - real


def first_tokens(count, mask, length):
    """`(b, t)` bool: which of `length` tokens are among the first `count` `(b,)` of their row, and real."""
    first = ops.arange(length, dtype="int32")[None] < ops.cast(count, "int32")[:, None]
    return first if mask is None else ops.logical_and(first, mask)


def begins_document(segment_ids, mask):
    """`(b, t)` bool: whether a token is real and of another document than the last real one before it.

    The first real token of a row begins none: it may go on with what an initial state has seen.
    """
    if mask is None:
        changes = ops.not_equal(segment_ids[:, 1:], segment_ids[:, :-1])
        return ops.pad(changes, ((0, 0), (1, 0)))
    order, rank = compaction(mask)
    previous = ops.take_along_axis(order, ops.maximum(rank - 1, 0), axis=1)
    changes = ops.not_equal(segment_ids, ops.take_along_axis(segment_ids, previous, axis=1))
    return ops.logical_and(ops.logical_and(changes, rank > 0), mask)


# The document of a state that has seen none with a number: whatever comes goes on with it.
NO_DOCUMENT = -(2**31)


def documents_at_the_ends(document, segment_ids, mask):
    """How the documents of some more tokens join those before them.

    Args:
        document: `(b,)` int32, the document of the last real token before, or NO_DOCUMENT.
        segment_ids: `(b, t)` int32.
        mask: `(b, t)` bool or None.

    Returns:
        `(goes_on, last)`: `(b,)` bool, whether the first real token is of that document, and `(b,)` int32, the
        document of the last real one. A row without a real token goes on and keeps its document.
    """
    if mask is None:
        first, last = segment_ids[:, 0], segment_ids[:, -1]
        return ops.logical_or(ops.equal(document, NO_DOCUMENT), ops.equal(first, document)), last
    order, _ = compaction(mask)
    count = ops.sum(ops.cast(mask, "int32"), axis=1, keepdims=True)
    ends = ops.concatenate([order[:, :1], ops.take_along_axis(order, ops.maximum(count - 1, 0), axis=1)], axis=1)
    ends = ops.take_along_axis(segment_ids, ends, axis=1)
    nothing = ops.equal(count[:, 0], 0)
    same = ops.logical_or(ops.equal(document, NO_DOCUMENT), ops.equal(ends[:, 0], document))
    return ops.logical_or(nothing, same), ops.where(nothing, document, ends[:, 1])

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

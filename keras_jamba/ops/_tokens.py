"""Which tokens of a batch of sequences are real, and which documents they belong to."""

from typing import Any, NamedTuple

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
        return _changes(segment_ids)
    order, rank = compaction(mask)
    previous = ops.take_along_axis(order, ops.maximum(rank - 1, 0), axis=1)
    changes = ops.not_equal(segment_ids, ops.take_along_axis(segment_ids, previous, axis=1))
    return ops.logical_and(ops.logical_and(changes, rank > 0), mask)


def document_numbers(segment_ids, mask):
    """`(b, t)` int32: 0 for the first document of each row, one more for each that follows.

    A change of the id between two real tokens begins a document, so ids may repeat and decrease: 0 1 0 are three.
    """
    return ops.cumsum(ops.cast(begins_document(segment_ids, mask), "int32"), axis=1)


# The document of a state that has seen none with a number: the next token continues it, whatever its id.
NO_DOCUMENT = -(2**31)


class Documents(NamedTuple):
    """The documents of some more tokens, and how they join the state before them.

    Attributes:
        numbers: `(b, t)` int32, see `document_numbers`.
        continues: `(b,)` bool, whether the first real token continues the state. True for a row without a real token.
        last: `(b,)` int32, the id of the document of the last real token, or NO_DOCUMENT.
        cleared: `(b,)` bool or None, whether a reset follows the last real token: the state after the tokens is empty.
    """

    numbers: Any
    continues: Any
    last: Any
    cleared: Any = None

    def opening(self, state):
        """A dict of state tensors `(b, ...)`, zero in rows whose first document is a new one."""
        return _kept_rows(state, self.continues)

    def closing(self, state):
        """A dict of state tensors `(b, ...)`, zero in rows that end with a reset."""
        return state if self.cleared is None else _kept_rows(state, ops.logical_not(self.cleared))


def _kept_rows(state, rows):
    wide = lambda x: ops.reshape(rows, (-1, *(1 for _ in x.shape[1:])))  # noqa: E731
    return {name: ops.where(wide(x), x, ops.zeros_like(x)) for name, x in state.items()}


def documents_of(segment_ids, reset_mask, mask, before):
    """`Documents` of some more tokens, or None without `segment_ids` and `reset_mask`.

    Args:
        segment_ids: `(b, t)` int32 or None. A change of the id begins a document.
        reset_mask: `(b, t)` bool or None. True begins a document. At padding it does so at the next real token, in this
            call or a later one.
        mask: `(b, t)` bool or None.
        before: `(b,)` int32, the id of the document of the last real token before these, or NO_DOCUMENT.
    """
    if segment_ids is None and reset_mask is None:
        return None
    if mask is None:
        return _documents(segment_ids, None if reset_mask is None else _resets(reset_mask), before)
    order, rank = compaction(mask)
    in_order = lambda x: ops.take_along_axis(x, order, axis=1)  # noqa: E731
    count = ops.sum(ops.cast(mask, "int32"), axis=1)
    resets = None if reset_mask is None else _resets(reset_mask)
    found = _documents(
        None if segment_ids is None else in_order(segment_ids),
        None if resets is None else in_order(resets),
        before,
        count,
    )
    # Padding takes the number of the real token before it.
    numbers = ops.take_along_axis(found.numbers, ops.maximum(rank + ops.cast(mask, "int32") - 1, 0), axis=1)
    found = found._replace(numbers=numbers)
    if resets is None:
        return found
    cleared = resets[:, -1] > ops.where(count > 0, _at(in_order(resets), count), 0)
    return found._replace(cleared=cleared, last=ops.where(cleared, NO_DOCUMENT, found.last))


def _resets(reset_mask):
    """`(b, t)` int32: how many resets there are up to each token."""
    return ops.cumsum(ops.cast(reset_mask, "int32"), axis=1)


def _documents(segment_ids, resets, before, count=None):
    """`Documents` of rows without padding, of which the first `count` `(b,)` tokens are real; None for all."""
    like = segment_ids if resets is None else resets
    begins, continues, last = ops.zeros_like(like, dtype="bool"), ops.ones_like(before, dtype="bool"), before
    if resets is not None:
        begins = _changes(resets)
        continues = ops.equal(resets[:, 0], 0)
        ends = resets[:, -1] if count is None else _at(resets, count)
        last = ops.where(ops.equal(ends, 0), last, NO_DOCUMENT)
    if segment_ids is not None:
        begins = ops.logical_or(begins, _changes(segment_ids))
        same = ops.logical_or(ops.equal(before, NO_DOCUMENT), ops.equal(segment_ids[:, 0], before))
        continues = ops.logical_and(continues, same)
        last = segment_ids[:, -1] if count is None else _at(segment_ids, count)
    if count is not None:
        nothing = ops.equal(count, 0)
        continues, last = ops.logical_or(nothing, continues), ops.where(nothing, before, last)
    return Documents(ops.cumsum(ops.cast(begins, "int32"), axis=1), continues, last)


def _changes(x):
    return ops.pad(ops.not_equal(x[:, 1:], x[:, :-1]), ((0, 0), (1, 0)))


def _at(x, count):
    """`(b,)`: the last of the first `count` `(b,)` tokens of each row of `(b, t)`."""
    return ops.take_along_axis(x, ops.maximum(count - 1, 0)[:, None], axis=1)[:, 0]

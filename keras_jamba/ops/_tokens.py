"""Real tokens and documents in a batch of padded and packed sequences."""

from typing import Any, NamedTuple

from keras import ops

from keras_jamba import _backend


def compaction(mask):
    """Returns where the real tokens of each row are.

    Args:
        mask: `(b, t)` bool, True for real tokens.

    Returns:
        `(order, rank)`, both `(b, t)` int32. `order` lists the indices of the real tokens, then those of the
        padding. `rank` is the number of real tokens before each token.
    """
    length = ops.shape(mask)[1]
    index = ops.arange(length, dtype="int32")[None]
    real = ops.cast(mask, "int32")
    order = _backend.tensors.argsort((1 - real) * length + index)
    return order, ops.cumsum(real, axis=1) - real


def zero_padding(x, mask):
    """Returns `x (b, t, ...)` with zeros where `mask` `(b, t)` is False; `x` itself if either is None.

    A product with 0 would keep NaN and infinity.
    """
    if x is None or mask is None:
        return x
    return ops.where(ops.reshape(mask, (*ops.shape(mask), *(1 for _ in x.shape[2:]))), x, ops.zeros_like(x))


def first_tokens(count, mask, length):
    """Returns `(b, t)` bool: whether each of `length` tokens is real and among the first `count` `(b,)` of its row."""
    first = ops.arange(length, dtype="int32")[None] < ops.cast(count, "int32")[:, None]
    return first if mask is None else ops.logical_and(first, mask)


def begins_document(segment_ids, mask):
    """Returns `(b, t)` bool: whether a token is real and its document differs from the previous real token's.

    False for the first real token of a row, which may continue the document of an initial state.
    """
    if mask is None:
        return _changes(segment_ids)
    order, rank = compaction(mask)
    previous = _backend.tensors.take_tokens(order, ops.maximum(rank - 1, 0))
    changes = ops.not_equal(segment_ids, _backend.tensors.take_tokens(segment_ids, previous))
    return ops.logical_and(ops.logical_and(changes, rank > 0), mask)


def document_numbers(segment_ids, mask):
    """Returns `(b, t)` int32: the documents of each row numbered 0, 1, 2, ...

    A change of the id between two real tokens begins a document. Ids may repeat and decrease: 0 1 0 are three.
    """
    return ops.cumsum(ops.cast(begins_document(segment_ids, mask), "int32"), axis=1)


def first_of_documents(numbers, mask, count):
    """Returns `(b, t)` bool: whether a token is among the first `count` real tokens of its document in the row.

    Args:
        numbers: `(b, t)` int32, see `document_numbers`.
        mask: `(b, t)` bool or None.
        count: integer, 1 or more.
    """
    if mask is not None:
        order, rank = compaction(mask)
        numbers = _backend.tensors.take_tokens(numbers, order)
    before = ops.pad(numbers, [(0, 0), (count, 0)], constant_values=-1)[:, : ops.shape(numbers)[1]]
    first = ops.not_equal(before, numbers)
    return first if mask is None else _backend.tensors.take_tokens(first, rank)


# The document of a state without document ids: the next token continues it with any id.
NO_DOCUMENT = -(2**31)


class Documents(NamedTuple):
    """Documents of new tokens, and their relation to the state before them.

    Attributes:
        numbers: `(b, t)` int32, see `document_numbers`.
        continues: `(b,)` bool, whether the first real token continues the state. True for rows without a real token.
        last: `(b,)` int32, the document id of the last real token, or NO_DOCUMENT.
        cleared: `(b,)` bool or None, whether a reset follows the last real token. The state after the tokens is
            then empty.
    """

    numbers: Any
    continues: Any
    last: Any
    cleared: Any = None

    def opening(self, state):
        """Returns a dict of state tensors `(b, ...)`, zero in rows that begin with a new document."""
        return _kept_rows(state, self.continues)

    def closing(self, state):
        """Returns a dict of state tensors `(b, ...)`, zero in rows that end with a reset."""
        return state if self.cleared is None else _kept_rows(state, ops.logical_not(self.cleared))


def _kept_rows(state, rows):
    wide = lambda x: ops.reshape(rows, (-1, *(1 for _ in x.shape[1:])))  # noqa: E731
    return {name: ops.where(wide(x), x, ops.zeros_like(x)) for name, x in state.items()}


def documents_of(segment_ids, reset_mask, mask, before):
    """Returns the `Documents` of new tokens, or None without `segment_ids` and `reset_mask`.

    Args:
        segment_ids: `(b, t)` int32 or None. A change of the id begins a document.
        reset_mask: `(b, t)` bool or None. True begins a document. At padding, the next real token begins it, in this
            call or a later one.
        mask: `(b, t)` bool or None.
        before: `(b,)` int32, the document id of the last real token before the new ones, or NO_DOCUMENT.
    """
    if segment_ids is None and reset_mask is None:
        return None
    if mask is None:
        return _documents(segment_ids, None if reset_mask is None else _resets(reset_mask), before)
    order, rank = compaction(mask)
    in_order = lambda x: _backend.tensors.take_tokens(x, order)  # noqa: E731
    count = ops.sum(ops.cast(mask, "int32"), axis=1)
    resets = None if reset_mask is None else _resets(reset_mask)
    found = _documents(
        None if segment_ids is None else in_order(segment_ids),
        None if resets is None else in_order(resets),
        before,
        count,
    )
    # Padding gets the number of the real token before it.
    numbers = _backend.tensors.take_tokens(found.numbers, ops.maximum(rank + ops.cast(mask, "int32") - 1, 0))
    found = found._replace(numbers=numbers)
    if resets is None:
        return found
    cleared = resets[:, -1] > ops.where(count > 0, _at(in_order(resets), count), 0)
    return found._replace(cleared=cleared, last=ops.where(cleared, NO_DOCUMENT, found.last))


def _resets(reset_mask):
    """Returns `(b, t)` int32: the number of resets up to and including each token."""
    return ops.cumsum(ops.cast(reset_mask, "int32"), axis=1)


def _documents(segment_ids, resets, before, count=None):
    """Returns the `Documents` of rows whose first `count` `(b,)` tokens are real; None if all are."""
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
    # Tensors of t - 1 tokens would exclude t = 2 from an export.
    length = ops.shape(x)[1]
    changes = ops.not_equal(x, ops.pad(x, ((0, 0), (1, 0)))[:, :length])
    return ops.logical_and(changes, ops.arange(length, dtype="int32") > 0)


def _at(x, count):
    """Returns `(b,)`: the value of token number `count - 1` in each row of `x (b, t)`."""
    return _backend.tensors.take_tokens(x, ops.maximum(count - 1, 0)[:, None])[:, 0]

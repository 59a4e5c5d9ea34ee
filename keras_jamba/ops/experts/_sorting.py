"""Assignments sorted by expert, as index arrays that stay on the device."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_jamba import _backend


class Sorted(NamedTuple):
    """Assignments of tokens to experts as rows sorted by expert, all int32.

    Attributes:
        order: `(s * k,)`, the assignment of each row; token i has the assignments `i * k` to `i * k + k - 1`.
        source: `(s * k,)`, the token of each row.
        place: `(s, k)`, the row of each assignment.
        counts: `(x,)`, the number of rows per expert.
    """

    order: Any
    source: Any
    place: Any
    counts: Any


def in_one_dtype(*tensors):
    """Returns the tensors, any of which may be None, in the result dtype of their product."""
    dtype = keras.backend.result_type(*(x.dtype for x in tensors if x is not None))
    return [None if x is None else ops.cast(x, dtype) for x in tensors]


def sorted_by_expert(indices, experts):
    """Returns `indices` `(s, k)` as `Sorted` rows; `experts` is the number of experts."""
    expert = ops.cast(ops.reshape(indices, (-1,)), "int32")
    order = ops.cast(ops.argsort(expert), "int32")
    place = ops.cast(ops.argsort(order), "int32")
    counts = ops.cast(expert[:, None] == ops.arange(experts, dtype="int32"), "int32")
    counts = ops.cast(ops.sum(counts, axis=0), "int32")
    return Sorted(order, order // indices.shape[1], ops.reshape(place, (-1, indices.shape[1])), counts)


def _forward(x, index, inverse):
    return ops.take(x, index, axis=0), inverse


def _backward(inverse, gradient):
    rows = ops.take(gradient, ops.reshape(inverse, (-1,)), axis=0)
    return ops.sum(ops.reshape(rows, (*inverse.shape, -1)), axis=1), None, None


_taken = _backend.autodiff.custom_gradient(_forward, _backward)


def taken(x, index, inverse):
    """Returns the rows of `x` at `index`. The gradient is a gather too, and sums rows in a fixed order.

    `inverse` `(rows of x, copies)` lists the places of each row of `x` in the result.
    """
    if not _backend.autodiff.can_trace_custom_gradient():
        return ops.take(x, index, axis=0)
    return _taken(x, index, inverse)

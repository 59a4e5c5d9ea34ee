"""Assignments sorted by expert: where each comes from and goes to, in arrays that never leave the device."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_jamba import _backend


class Sorted(NamedTuple):
    """The rows of a mixture: all assignments of tokens to experts, those of the first expert first. All int32.

    Attributes:
        order: `(s * k,)`, of each row its assignment: k of the first token, k of the second, ...
        source: `(s * k,)`, of each row its token.
        place: `(s, k)`, of each assignment its row.
        counts: `(x,)`, how many rows each expert has.
    """

    order: Any
    source: Any
    place: Any
    counts: Any


def in_one_dtype(*tensors):
    """The tensors, any of which may be None, in the dtype that a product of all of them has."""
    dtype = keras.backend.result_type(*(x.dtype for x in tensors if x is not None))
    return [None if x is None else ops.cast(x, dtype) for x in tensors]


def sorted_by_expert(indices, experts):
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
    """Rows of `x`; the gradient is a gather too, and no sum over rows in any order.

    `inverse` `(rows of x, n)` says in which n places each row of `x` is in the result.
    """
    if not _backend.autodiff.can_trace_custom_gradient():
        return ops.take(x, index, axis=0)
    return _taken(x, index, inverse)

"""Attention in which NaN and infinity reach only the tokens that see them, in outputs and gradients.

A softmax gives invisible keys the weight 0, and 0 times NaN is NaN. So damaged queries, keys, values and gradients are
replaced by zeros before the products. The outputs and gradients of the tokens that see them become NaN afterwards. For
that, each token has a damage, 0 or 1. Forward, the visibility carries it from keys to queries; the gradient of the
damage carries it back.
"""

import functools

import keras
from keras import ops

from keras_jamba import _backend

# Sums of products of a head's values stay below this bound, and finite in float32.
_LARGEST = 1e38


def isolated(attend, query, key, value, reach, tokens):
    """Returns `attend(query, key, value)` `(b, t, h, c)`, with damage only in tokens that see it.

    Args:
        attend: the function of attention.
        query: `(b, t, h, c)`.
        key, value: `(b, s, g, c)`.
        reach: hashable, with `to_queries(of_key, tokens)`, which returns `(b, t)` bool, whether each query sees a key
            with `of_key` `(b, s)` bool, and `to_keys(of_query, tokens)`, which returns `(b, s)` bool, whether a query
            with `of_query` `(b, t)` bool sees each key.
        tokens: the tensors that both read.
    """
    (query, of_query), (key, of_key), (value, of_value) = map(_cleared, (query, key, value))
    mark, mark_with_gradient = _marks(reach)
    outputs = attend(query, key, value)
    if not _backend.autodiff.can_trace_custom_gradient():
        return mark(outputs, of_query, of_key + of_value, *tokens)[0]
    return mark_with_gradient(outputs, of_query, of_key + of_value, *tokens)


def largest(width):
    """Returns the magnitude from which values of heads of this width are too large for a product."""
    return (_LARGEST / width) ** 0.5


def _is_damaged(x):
    """Returns `(b, t)` bool: whether a value of `x (b, t, h, c)` is NaN, infinite or too large for a product."""
    x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
    # Not `ops.max`, which drops NaN on TensorFlow.
    return ops.logical_not(ops.all(ops.abs(x) < largest(x.shape[3]), axis=(2, 3)))


def _replaced(x, where, value):
    # A tensor, because PyTorch would copy a constant to the device and synchronise.
    return ops.where(ops.expand_dims(where, (2, 3)), ops.zeros_like(x) + value, x)


def _clear(x):
    damaged = _is_damaged(x)
    damage = ops.cast(damaged, "float32")
    return (_replaced(x, damaged, 0.0), damage), damage


def _clear_backward(damage, gradients):
    gradient, of_damage = gradients
    # A token that sees this one has a damaged gradient.
    return (_replaced(gradient, damage + of_damage > 0, float("nan")),)


@functools.cache
def _marks(reach):
    """Returns the function that marks damaged outputs, without and with its gradient."""

    def mark(x, of_query, of_key, *tokens):
        damaged = ops.logical_or(of_query > 0, reach.to_queries(of_key > 0, tokens))
        return _replaced(x, damaged, float("nan")), (damaged, tokens)

    def backward(residuals, gradient):
        damaged, tokens = residuals
        damaged = ops.logical_or(damaged, _is_damaged(gradient))
        seen = ops.cast(reach.to_keys(damaged, tokens), "float32")
        no_gradients = (None for _ in tokens)
        return _replaced(gradient, damaged, 0.0), ops.cast(damaged, "float32"), seen, *no_gradients

    return mark, _backend.autodiff.custom_gradient(mark, backward, has_loops=reach.has_loops)


_clear_with_gradient = _backend.autodiff.custom_gradient(_clear, _clear_backward, has_loops=False)


def _cleared(x):
    return _clear_with_gradient(x) if _backend.autodiff.can_trace_custom_gradient() else _clear(x)[0]

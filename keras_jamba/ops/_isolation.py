"""Attention in which NaN and infinity reach only the tokens that see them, in outputs and gradients.

A softmax gives invisible keys the weight 0, and 0 times NaN is NaN. So damaged queries, keys, values and gradients are
replaced by zeros before the products. The outputs and gradients of the tokens that see them become NaN afterwards. For
that, each token has a damage, 0 or 1. Forward, the visibility carries it from keys to queries; the gradient of the
damage carries it back.
"""

from keras import ops

from keras_jamba import _backend

# Sums of products of a head's values stay below this bound, and finite in float32.
_LARGEST = 1e38


def isolated(attend, query, key, value, visible):
    """Returns `attend(query, key, value)` `(b, t, h, c)`, with damage among the `visible` `(b, t, s)` bool tokens.

    `query`: `(b, t, h, c)`. `key`, `value`: `(b, s, g, c)`.
    """
    (query, of_query), (key, of_key), (value, of_value) = map(_cleared, (query, key, value))
    return _marked(attend(query, key, value), of_query, of_key + of_value, visible)


def _is_damaged(x):
    """Returns `(b, t)` bool: whether a value of `x (b, t, h, c)` is NaN, infinite or too large for a product."""
    # Not `ops.max`, which drops NaN on TensorFlow.
    return ops.logical_not(ops.all(ops.abs(x) < (_LARGEST / x.shape[3]) ** 0.5, axis=(2, 3)))


def _replaced(x, where, value):
    # A tensor, because PyTorch would copy a constant to the device and synchronise.
    return ops.where(where[:, :, None, None], ops.zeros_like(x) + value, x)


def _clear(x):
    damaged = _is_damaged(x)
    damage = ops.cast(damaged, "float32")
    return (_replaced(x, damaged, 0.0), damage), damage


def _clear_backward(damage, gradients):
    gradient, of_damage = gradients
    # A token that sees this one has a damaged gradient.
    return (_replaced(gradient, damage + of_damage > 0, float("nan")),)


def _mark(x, of_query, of_key, visible):
    sees_damage = ops.any(ops.logical_and(visible, (of_key > 0)[:, None]), axis=2)
    damaged = ops.logical_or(of_query > 0, sees_damage)
    return _replaced(x, damaged, float("nan")), (damaged, visible)


def _mark_backward(residuals, gradient):
    damaged, visible = residuals
    damaged = ops.logical_or(damaged, _is_damaged(gradient))
    seen = ops.any(ops.logical_and(visible, damaged[:, :, None]), axis=1)
    return _replaced(gradient, damaged, 0.0), ops.cast(damaged, "float32"), ops.cast(seen, "float32"), None


_clear_with_gradient = _backend.autodiff.custom_gradient(_clear, _clear_backward, has_loops=False)
_mark_with_gradient = _backend.autodiff.custom_gradient(_mark, _mark_backward, has_loops=False)


def _cleared(x):
    return _clear_with_gradient(x) if _backend.autodiff.can_trace_custom_gradient() else _clear(x)[0]


def _marked(*tensors):
    return _mark_with_gradient(*tensors) if _backend.autodiff.can_trace_custom_gradient() else _mark(*tensors)[0]

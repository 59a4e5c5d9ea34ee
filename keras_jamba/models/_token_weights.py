"""Weights of targets that are tokens: per token, per row and per class."""

import numbers

import numpy as np
from keras import ops


def token_weights(inputs, targets, weights):
    """Returns weights `(b, t)`, one per target.

    Args:
        inputs: inputs of the model. If they are a dict with a padding_mask `(b, t)`, hidden tokens have the weight 0.
        targets: `(b, t)`. For other shapes, or several targets, `weights` are returned as they are.
        weights: `(b, t)`; or one weight per row, `(b,)` or `(b, 1)`; or None.

    Returns:
        `(b, t)` float32; None without weights and padding_mask.

    Raises:
        ValueError: for weights of another shape.
    """
    if isinstance(targets, (dict, list, tuple)) or targets is None or len(_shape(targets) or ()) != 2:
        return weights
    mask = inputs.get("padding_mask") if isinstance(inputs, dict) else None
    if weights is not None:
        check_weights(weights, targets)
        weights = ops.reshape(ops.cast(weights, "float32"), (ops.shape(targets)[0], -1))
        weights = weights * ops.ones_like(targets, dtype="float32")
    if mask is None:
        return weights
    mask = ops.cast(ops.cast(mask, "bool"), "float32")
    return mask if weights is None else weights * mask


def _shape(x):
    """Returns the shape as a tuple; None if TensorFlow has traced a step for tensors of several ranks."""
    try:
        return tuple(x.shape)
    except ValueError:
        return None


def check_weights(weights, targets):
    """Checks that weights have one value per target `(b, t)` or per row, if their shape is known.

    Raises:
        ValueError: for weights of another shape.
    """
    weights, targets = _shape(weights), _shape(targets)
    if weights is None or targets is None or len(targets) != 2:
        return
    fits = lambda a, b: a is None or b is None or a == b  # noqa: E731
    rank = len(weights) in (1, 2) and fits(weights[0], targets[0])
    if not rank or len(weights) == 2 and weights[1] != 1 and not fits(weights[1], targets[1]):
        raise ValueError(
            f"sample_weight must be of the shape of the targets, (b, t) = {targets}, or one number per row, (b,) or "
            f"(b, 1). Received: sample_weight.shape={weights}. Pass one weight per token or per row."
        )


def class_weights(class_weight, inputs, targets, weights):
    """Returns weights `(b, t)` of targets `(b, t)`, multiplied by the weights of their classes.

    Args:
        class_weight: a dict of token ids and numbers.
        inputs, targets: the arguments of `fit`; targets must be an array.
        weights: see `token_weights`.

    Raises:
        ValueError: for a class_weight of another form, and without an array of targets.
    """
    valid = isinstance(class_weight, dict) and all(
        isinstance(i, numbers.Integral) and isinstance(w, numbers.Real) for i, w in class_weight.items()
    )
    if not valid:
        raise ValueError(
            "class_weight must be a dict of token ids and numbers. Received: "
            f"class_weight={str(class_weight)[:60]}. Pass for example {{2: 0.5}}."
        )
    if targets is None or not hasattr(targets, "shape") or len(targets.shape) != 2:
        raise ValueError(
            "class_weight gives weights to an array of targets (b, t). Received: class_weight, with inputs of type "
            f"{type(inputs).__name__} and targets of type {type(targets).__name__}. Let a dataset yield sample_weight "
            "(b, t) as its third part."
        )
    targets = ops.convert_to_numpy(targets)
    found = np.ones(targets.shape, "float32")
    for token, weight in class_weight.items():
        found[targets == token] = weight
    return found if weights is None else found * ops.convert_to_numpy(token_weights(None, targets, weights))

"""Checks of losses, metrics and labels for models whose outputs are logits."""

import keras
import numpy as np
from keras import ops

from keras_jamba import _keras_internals
from keras_jamba.ops import _checks

_losses = keras.losses
# Keras functions that expect probabilities without from_logits=True, and their classes.
_FUNCTIONS = {
    _losses.sparse_categorical_crossentropy: _losses.SparseCategoricalCrossentropy,
    _losses.categorical_crossentropy: _losses.CategoricalCrossentropy,
    _losses.categorical_focal_crossentropy: _losses.CategoricalFocalCrossentropy,
    _losses.binary_crossentropy: _losses.BinaryCrossentropy,
    _losses.binary_focal_crossentropy: _losses.BinaryFocalCrossentropy,
}
_SHORT_NAMES = ("crossentropy", "ce")
# These expect probabilities and have no argument from_logits.
_DIVERGENCES = (_losses.kl_divergence, _losses.dice, _losses.tversky, _losses.categorical_generalized_cross_entropy)
_DIVERGENCE_CLASSES = (
    *(_losses.KLDivergence, _losses.Dice, _losses.Tversky, _losses.CategoricalGeneralizedCrossEntropy),
    keras.metrics.KLDivergence,
)
# The labels of these have another shape than the logits.
_OTHER_LABELS = (_losses.CTC, _losses.Circle, _losses.ctc, _losses.circle)


def check_compile(loss, metrics, weighted_metrics, num_classes):
    """Raises ValueError if a loss or a metric of `compile` expects probabilities."""
    _check_logits("loss", loss)
    _check_logits("metrics", metrics)
    _check_logits("weighted_metrics", weighted_metrics)
    _check_thresholds([metrics, weighted_metrics], num_classes)


def check_has_labels(y, loss):
    """Raises ValueError if there is a loss and no labels."""
    if y is None and loss is not None:
        raise ValueError(
            "fit and evaluate need labels for the loss of compile. Received: y=None. Pass fit(images, labels), or "
            "data that yields pairs (images, labels)."
        )


def loss_of_labels(compute_loss, loss, y, class_count, sample_weight):
    """Returns `compute_loss(y)`, or NaN with a gradient of zero if a label with weight is not a class.

    Compiled code cannot raise. For such labels, Keras' losses raise on some devices and end the process on others.
    """
    wrong = _wrong_labels(_unwrapped(loss), y, class_count)
    if wrong is None:
        return compute_loss(y)
    value = compute_loss(_with_zeros(y, wrong))
    # sqrt(-1) is NaN. On PyTorch, a constant would be copied to the device, which synchronises.
    return ops.where(_any_weighted(wrong, sample_weight), ops.sqrt(ops.zeros_like(value) - 1), value)


def class_numbers(labels, loss, class_count):
    """Returns labels with 0 in place of those that are not classes."""
    return _with_zeros(labels, _wrong_labels(loss, labels, class_count))


def check_labels(labels, loss, logits_shape, weights=None):
    """Checks that the labels of one batch fit the loss and the classes, and their values if the host can read them.

    Args:
        labels: an array or tensor; None and structures of several arrays are not checked.
        loss: the loss of `compile`.
        logits_shape: `(b, num_classes)`, or `(b, t, v)` for text.
        weights: weights in the shape of the labels, or None. Labels without weight may have any value.

    Raises:
        ValueError: for labels of another shape or dtype, and for numbers that are not classes.
    """
    loss, labels, weights = _unwrapped(loss), _unwrapped(labels), _unwrapped(weights)
    if isinstance(labels, (list, tuple)) and labels and np.isscalar(labels[0]):
        labels = np.asarray(labels)
    if loss is None or not hasattr(labels, "shape"):
        return
    shape, logits_shape = tuple(labels.shape), tuple(logits_shape)
    if _is_sparse(loss):
        _check_class_numbers(labels, loss, shape, logits_shape, weights)
    elif _needs_equal_shapes(loss) and shape != logits_shape and (*shape, 1) != logits_shape:
        remedy = f"Change the labels to one number per class, {logits_shape[-1]} of them."
        if shape in (logits_shape[:-1], (*logits_shape[:-1], 1)):
            remedy = (
                "For integer labels compile with keras.losses.SparseCategoricalCrossentropy(from_logits=True), or "
                f"convert them with keras.utils.to_categorical(labels, {logits_shape[-1]})."
            )
        raise ValueError(
            f"With this loss, {_name(loss)}, labels must have the shape {logits_shape} of the logits. Received: labels "
            f"of shape {shape}. {remedy}"
        )


def _check_class_numbers(labels, loss, shape, logits_shape, weights):
    """Raises ValueError unless `labels` are class numbers in the shape of the logits without the last axis."""
    count, values = logits_shape[-1], _checks.host_array(labels)
    if shape not in (logits_shape[:-1], (*logits_shape[:-1], 1)):
        remedy = "Pass one class number per example."
        if shape == logits_shape:
            remedy = (
                "For one-hot labels compile with keras.losses.CategoricalCrossentropy(from_logits=True), or convert "
                "them with numpy.argmax(labels, axis=-1)."
            )
        raise ValueError(
            f"With this loss, {_name(loss)}, labels must be class numbers of shape {logits_shape[:-1]}. Received: "
            f"labels of shape {shape}. {remedy}"
        )
    if values is None:
        return
    numeric = values.dtype.kind in "iubf" or values.dtype.name == "bfloat16"
    wrong = ~_are_classes(values, count, getattr(loss, "ignore_class", None)) if numeric else np.ones(shape, bool)
    weights = None if weights is None else ops.convert_to_numpy(weights)
    if weights is not None and weights.size == wrong.size:
        wrong &= np.reshape(weights, wrong.shape) != 0
    if wrong.any():
        size = "num_classes" if len(logits_shape) == 2 else "vocab_size"
        received = f"labels of dtype {values.dtype}"
        remedy = "Convert the labels to integers."
        if numeric:
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            received = f"{values[where]} at {list(where)}"
            remedy = "Correct the labels."
            if len(logits_shape) == 2 and values.max() >= count:
                remedy = f"Build the model with num_classes above {values.max()}, or correct the labels."
            if values.min() == 1 and values.max() == count:
                remedy = "Count classes from 0: pass labels - 1."
        raise ValueError(f"Labels must be integers from 0 to {size} - 1 = {count - 1}. Received: {received}. {remedy}")


def _are_classes(values, count, ignore_class):
    """Returns a bool array: whether each value is a class number or `ignore_class`."""
    valid = (values >= 0) & (values < count)
    if values.dtype.kind not in "iub":
        valid &= values == np.floor(values)
    return valid if ignore_class is None else valid | (values == ignore_class)


def _wrong_labels(loss, labels, class_count):
    """Returns a bool tensor that is True where a label is not a class; None for a loss without class numbers."""
    if not _is_sparse(loss) or class_count is None or not hasattr(labels, "shape"):
        return None
    labels = ops.convert_to_tensor(labels)
    dtype = keras.backend.standardize_dtype(labels.dtype)
    is_float = keras.backend.is_float_dtype(dtype)
    # The number of classes may overflow a narrow integer type.
    values = labels if is_float or dtype.endswith(("32", "64")) else ops.cast(labels, "int32")
    valid = ops.logical_and(values >= 0, values < class_count)
    if is_float:
        valid = ops.logical_and(valid, ops.equal(values, ops.floor(values)))
    if getattr(loss, "ignore_class", None) is not None:
        valid = ops.logical_or(valid, ops.equal(values, loss.ignore_class))
    return ops.logical_not(valid)


def _with_zeros(labels, where):
    """Returns the labels with 0 where a mask is True."""
    labels = ops.convert_to_tensor(labels)
    return ops.where(where, ops.zeros_like(labels), labels)


def _any_weighted(wrong, sample_weight):
    """Returns a scalar bool tensor: whether any wrong label has a weight other than 0."""
    if sample_weight is not None:
        # Either of the two may have a trailing axis of size 1.
        more = len(sample_weight.shape) - len(wrong.shape)
        sample_weight = (
            ops.squeeze(sample_weight, axis=-1) if more == 1 and sample_weight.shape[-1] == 1 else sample_weight
        )
        wrong = ops.squeeze(wrong, axis=-1) if more == -1 and wrong.shape[-1] == 1 else wrong
    if sample_weight is not None and tuple(sample_weight.shape) == tuple(wrong.shape):
        wrong = ops.logical_and(wrong, ops.not_equal(sample_weight, 0))
    return ops.any(wrong)


def _check_logits(argument, given):
    """Raises ValueError if a loss or metric in the structure `given` expects probabilities."""
    for each in keras.tree.flatten(given):
        name = _logits_replacement(argument, each)
        if name is not None:
            module = "losses" if argument == "loss" else "metrics"
            raise ValueError(
                f"{argument} must take logits: the outputs of this model are not probabilities. Received: "
                f"{each if isinstance(each, str) else _name(each)!r} without from_logits=True. Pass "
                f"keras.{module}.{name}(from_logits=True). To load a saved model without its loss, call "
                "keras.models.load_model(file, compile=False)."
            )


def _logits_replacement(argument, each):
    """Returns the Keras class that replaces a loss or metric of probabilities; None for others."""
    if isinstance(each, str):
        if each.lower() in _SHORT_NAMES:
            # Keras resolves the metric "crossentropy" by the shape of the labels.
            return "SparseCategoricalCrossentropy"
        try:
            each = (keras.losses if argument == "loss" else keras.metrics).get(each)
        except ValueError:
            return None  # Keras reports unknown names later, and resolves "accuracy" by the labels.
    if each in _DIVERGENCES or isinstance(each, _DIVERGENCE_CLASSES):
        return "CategoricalCrossentropy"
    if _keras_internals.expects_probabilities(each):
        return type(each).__name__
    return _FUNCTIONS[each].__name__ if callable(each) and each in _FUNCTIONS else None


def _check_thresholds(metrics, num_classes):
    """Raises ValueError for metrics with the threshold 0.5 of probabilities; logits have the threshold 0."""
    for each in keras.tree.flatten(metrics):
        name = each.lower() if isinstance(each, str) else type(each).__name__
        compares_with_half = (
            name in ("binary_accuracy", "precision", "recall") or name in ("accuracy", "acc") and num_classes == 1
        )
        compares_with_half |= isinstance(each, keras.metrics.BinaryAccuracy) and each.threshold == 0.5
        if isinstance(each, (keras.metrics.Precision, keras.metrics.Recall)):
            compares_with_half |= each.init_thresholds is None and each.top_k is None
        if compares_with_half:
            raise ValueError(
                "metrics must have the threshold 0 of logits: the outputs of this model are not probabilities. "
                f"Received: {name!r} with the threshold 0.5. Pass keras.metrics.BinaryAccuracy(threshold=0.0), or "
                "keras.metrics.Precision(thresholds=0.0) and keras.metrics.Recall(thresholds=0.0)."
            )


def _unwrapped(structure):
    """Unwraps lists, tuples and dicts of length 1, as Keras does for one output."""
    while isinstance(structure, (list, tuple, dict)) and len(structure) == 1:
        structure = next(iter(structure.values() if isinstance(structure, dict) else structure))
    return structure


def _is_sparse(loss):
    """Returns whether the labels of a loss are class numbers."""
    return isinstance(loss, _losses.SparseCategoricalCrossentropy)


def _needs_equal_shapes(loss):
    """Returns whether labels must have the shape of the logits.

    This holds for most Keras losses. Custom losses have no known rule and return False.
    """
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if loss in _OTHER_LABELS or isinstance(loss, (_losses.CTC, _losses.Circle)):
        return False
    module = getattr(loss, "__module__", None) or type(loss).__module__
    return module.split(".")[0] == "keras"


def _name(loss):
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)

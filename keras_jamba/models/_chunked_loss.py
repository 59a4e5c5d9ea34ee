"""Steps of a language model without the logits of all tokens: the loss computes them in chunks.

Inside a step of `fit`, `evaluate`, `train_on_batch` or `test_on_batch`, a call returns `TokenFeatures` in place of
logits. `compute_loss` computes losses and predicted ids from them, and updates the accuracy. On JAX, a tensor that
`compute_loss` computes cannot reach `compute_metrics`, but updates of metrics can.
"""

from typing import NamedTuple

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Tensor
from keras_jamba.layers._token_embedding import TokenEmbedding
from keras_jamba.models._loss import TokenCrossentropy
from keras_jamba.ops.cross_entropy import CHUNK_BYTES

_LOOPS = ("fit", "train_on_batch", "evaluate", "test_on_batch")
# Methods of a model that see logits, or that replace those which do.
_METHODS = (
    *("__call__", "call", "logits", "compute_loss", "compute_metrics", "train_step", "test_step"),
    *("stateless_call", "stateless_compute_loss", "compute_loss_and_updates"),
)
# Smaller vocabularies gain no memory worth mentioning where a graph does not know the number of tokens.
_FEWEST_CLASSES = 8192


class TokenFeatures(NamedTuple):
    """The features `(b, t, d)` whose logits the loss computes in chunks."""

    features: Tensor


def suits(loss, metrics, weighted_metrics):
    """Returns whether the arguments of `compile` need only the loss and the predicted id of each token."""
    if type(loss) is not TokenCrossentropy or loss.dtype != "float32":
        return False
    options = loss.get_config()
    logits = options["from_logits"] and options["ignore_class"] is None and options.get("axis", -1) == -1
    return logits and all(map(_is_accuracy, keras.tree.flatten([metrics, weighted_metrics])))


def _is_accuracy(metric):
    return metric in (None, "accuracy", "acc") or type(metric) is keras.metrics.SparseCategoricalAccuracy


def replaces_logits(model, features):
    """Returns whether a call of the model for `features (b, t, d)` returns `TokenFeatures`, for its loss.

    This holds inside a step of Keras with a loss and metrics that `suits` accepts, unless the model or its head has
    other methods than those of the package, or shards its vocabulary. Few logits stay: one chunk is not worth it.
    """
    loop = model._this_loop()
    if not (model._inside_step and loop is not None and loop.kind in _LOOPS and model._suits_chunks):
        return False
    head = model.token_embedding
    return (
        _has_many_logits(features.shape[:2], head.input_dim)
        and type(head) is TokenEmbedding
        and head.has_cross_entropy
        and all(_is_unchanged(layer) for layer in (model, head))
        and not _is_sharded_by_model()
        and _backend.autodiff.can_trace_custom_gradient()
    )


def _has_many_logits(shape, width):
    """Returns whether the logits need more than one chunk; by the vocabulary alone if the shape is unknown."""
    if None in shape:
        return width >= _FEWEST_CLASSES
    return 4 * shape[0] * shape[1] * width > CHUNK_BYTES


def _is_unchanged(layer):
    """Returns whether the methods of a model or layer are those of Keras and the package, without hooks of PyTorch."""
    methods = [name for name in _METHODS if hasattr(layer, name)]
    modules = [getattr(type(layer), name).__module__ for name in methods if hasattr(type(layer), name)]
    known = all(module.startswith(("keras.", "keras_jamba.")) for module in modules)
    return known and vars(layer).keys().isdisjoint(methods) and not _backend.trainer.has_call_hooks(layer)


def _is_sharded_by_model():
    distribution, mesh = keras.distribution.distribution(), _backend.sharding.active_mesh()
    return distribution is not None and (mesh is None or mesh.model is not None)


def is_one_id_per_token(targets, y_pred):
    """Returns whether targets are a tensor `(b, t)` like the tokens of `TokenFeatures`."""
    return hasattr(targets, "shape") and len(targets.shape) == 2 and _fits(targets.shape, y_pred.features.shape)


def _fits(shape, of_features):
    return all(None in (a, b) or a == b for a, b in zip(shape, of_features[:2], strict=True))


def as_two_classes(targets, predicted):
    """Returns targets `(b, t)` and logits `(b, t, 2)`, whose accuracy is that of the `predicted` ids `(b, t)`."""
    # As Keras compares them.
    hits = ops.cast(ops.equal(ops.cast(targets, "float32"), ops.cast(predicted, "float32")), "float32")
    return ops.ones_like(predicted), ops.stack([1 - hits, hits], axis=-1)

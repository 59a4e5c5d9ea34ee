"""Augmentation with Keras' preprocessing layers, as a pure function of a batch and a random generator."""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TypeAlias

import keras
import numpy as np

from keras_jamba import _backend
from keras_jamba._typing import Tensors
from keras_jamba.ops import _checks

# Keras layers are not thread-safe while they build or trace. The lock is global because objects may share layers.
_TRACING = threading.Lock()

_REFUSED = {
    "AugMix": "it draws from Python's global generator",
    "RandomElasticTransform": "on PyTorch it draws from the global generator",
}


class Augmentation:
    """Augmentation by Keras' preprocessing layers: a pure function of a batch and a random generator.

    The layers run with `training=True` on the CPU. Their random numbers follow only from seeds drawn from the given
    generator. Earlier draws from the layers' own generators and the global ones have no effect. The layers are compiled
    if the backend compiles. Layers that cannot be compiled, such as `RandomCrop` on JAX, run eagerly. All frames of a
    clip use the same seeds and thus are rotated, mirrored and coloured alike.

    `MixUp` and `CutMix` mix each image with another of the batch, and their labels by the share of the pixels. All
    frames of a clip are mixed alike. Their random numbers have the distributions of Keras' layers, but NumPy draws and
    applies them, alike on every backend. `RandomCrop` makes images smaller. After `ZeroPadding2D(4)` it shifts all
    images of a batch alike by up to 4 pixels.

    Args:
        layers: a Keras layer or a list of layers. A `Sequential`, a `Pipeline` and an `Augmentation` are replaced by
            their layers. Layers with a `value_range` need (0, 1). A `Dropout` needs a seed: without one it draws from
            the global generator on PyTorch.
        num_classes: classes of integer labels, for `MixUp` and `CutMix`; None if labels are one-hot.

    Call arguments:
        batch: images, `(images, labels)` or `(images, labels, sample_weight)`, NumPy arrays. Images are `(b, h, w, c)`,
            or clips `(b, T, h, w, c)`, of floats from 0 to 1. Labels are `(b,)` integers or `(b, num_classes)` floats
            with `MixUp` or `CutMix`, and of any kind without.
        rng: a `numpy.random.Generator`.

    Returns:
        The batch. Images are float32. Labels are `(b, num_classes)` float32 with `MixUp` or `CutMix`, else unchanged.

    Raises:
        ValueError: for an object that is no layer, a layer that draws from generators other than its own, or a batch
            that is not as described. With `MixUp` or `CutMix`, also for a batch with weights.

    Example:
        >>> import keras, numpy as np
        >>> from keras_jamba.training.data import Augmentation, Batches
        >>> images, labels = np.zeros((8, 6, 6, 3), "float32"), np.arange(8) % 2
        >>> transform = Augmentation([keras.layers.RandomFlip(), keras.layers.MixUp()], num_classes=2)
        >>> batches = Batches((images, labels), batch_size=4, transform=transform)
        >>> [part.shape for part in batches.batch(0)]
        [(4, 6, 6, 3), (4, 2)]
    """

    def __init__(self, layers: "Layers", num_classes: int | None = None) -> None:
        if num_classes is not None:
            _checks.check_integer("num_classes", num_classes)
        self.layers, self.num_classes = tuple(_checked_layers(layers)), num_classes
        self._mixes = any(type(layer) in _KEPT for layer in self.layers)
        self._steps = [_Mixing(layer) if type(layer) in _KEPT else _Pure(layer) for layer in self.layers]

    def __call__(self, batch: Tensors, rng: np.random.Generator) -> Tensors:
        parts = batch if isinstance(batch, tuple) else (batch,)
        images, labels, *weights = (*parts, None)[: max(2, len(parts))]
        images = _checked_images(images)
        if self._mixes and (weights or labels is not None):
            labels = mixable_labels(labels, weights, self.num_classes, len(images))
        frames = [images] if images.ndim == 4 else list(np.moveaxis(images, 1, 0))
        with keras.device("cpu:0"):  # leaves the accelerator to training
            for step in self._steps:
                frames, labels = step(frames, labels, rng)
            frames = [np.asarray(keras.ops.convert_to_numpy(frame), "float32") for frame in frames]
        images = frames[0] if images.ndim == 4 else np.stack(frames, axis=1)
        return (images, labels, *weights)[: len(parts)] if isinstance(batch, tuple) else images


# What `Augmentation` takes.
Layers: TypeAlias = keras.layers.Layer | Augmentation | Sequence[keras.layers.Layer | Augmentation]


def mixable_labels(labels, weights, num_classes, count):
    """Returns the labels of `count` images that are mixed, as `(b, num_classes)` float32.

    Raises:
        ValueError: for weights, another number of labels, and labels that are neither one-hot nor integers below
            num_classes.
    """
    if weights:
        raise ValueError(
            "MixUp and CutMix do not support sample weights. Received: a batch with a sample_weight. Leave it out, "
            "or do not mix images."
        )
    labels = np.asarray(labels)
    if labels.shape[:1] != (count,):
        raise ValueError(
            f"Each image must have one label. Received: {count} images, and labels of shape {labels.shape}. Pass as "
            "many labels as images."
        )
    if np.issubdtype(labels.dtype, np.floating) and labels.ndim == 2:
        if num_classes not in (None, labels.shape[1]):
            raise ValueError(
                f"One-hot labels must have the shape (b, num_classes). Received: labels of shape {labels.shape}, "
                f"num_classes={num_classes}. Change one of the two."
            )
        return labels.astype("float32", copy=False)
    if num_classes is None:
        raise ValueError(
            "MixUp and CutMix need float labels of shape (b, num_classes), or integer labels of shape (b,) and "
            f"num_classes. Received: labels of shape {labels.shape}, {labels.dtype}, and num_classes=None. "
            "Pass num_classes to Augmentation or PhotoAugmentation, or one-hot labels."
        )
    return one_hot(labels, num_classes)


def one_hot(labels, num_classes):
    """Returns integer labels `(b,)` as one-hot `(b, num_classes)` float32.

    Raises:
        ValueError: for labels that are not integers `(b,)` from 0 to `num_classes - 1`.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"Labels must be integers of shape (b,). Received: shape {labels.shape}, {labels.dtype}. "
            "Pass labels.reshape(-1), or numpy.argmax(labels, axis=-1) of one-hot labels."
        )
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"Labels must be integers from 0 to num_classes - 1. Received: labels from {labels.min()} to "
            f"{labels.max()}, num_classes={num_classes}. Count classes from 0, or raise num_classes."
        )
    return np.eye(num_classes, dtype="float32")[labels]


class _Pure:
    """An augmentation step that calls a layer with seeds from the given generator alone."""

    def __init__(self, layer):
        self._layer, self._compiled = layer, _backend.compilation.jit(self._called)
        # `{shape: function}`: compiled, or eager if compilation failed.
        self._functions = {}

    def __call__(self, frames, labels, rng):
        shape = tuple(frames[0].shape)
        with nullcontext() if self._functions.get(shape) is self._compiled else _TRACING:
            if not self._layer.built:
                self._layer(frames[0], training=False)  # layers may create generators while they build
            values = self._values(rng)
            if shape not in self._functions:
                self._functions[shape] = self._found(frames[0], values)
            return [self._functions[shape](frame, values) for frame in frames], labels

    def _values(self, rng):
        """Returns a value per variable: weights unchanged, and new seeds for the states of random generators."""
        weights = {id(weight) for weight in self._layer.weights}
        return [
            keras.ops.convert_to_numpy(variable)
            if id(variable) in weights
            else np.array([rng.integers(2**31 - 1), 0], dtype=variable.dtype)
            for variable in self._layer.variables
        ]

    def _found(self, images, values):
        try:
            self._compiled(images, values)
        except Exception:  # tracers raise many types; the eager call repeats an error of the layer itself
            return self._called
        return self._compiled

    def _called(self, images, values):
        variables = self._layer.variables
        with keras.StatelessScope(list(zip(variables, values, strict=True))) as scope:
            images = self._layer(images, training=True)
        if scope.state_mapping.keys() - {id(variable) for variable in variables}:
            raise ValueError(
                "Layers must draw from their own generators, whose seeds are set per step. Received: "
                f"{self._layer!r}, which draws from Keras' global generator. Give it a keras.random.SeedGenerator as "
                "an attribute, and pass that as seed to its random functions."
            )
        return images


# On PyTorch Keras' own layers reseed the global generators that a model draws from, and never restore CUDA's. Keras'
# CutMix also underrates the image in its label, by 0.05 on average for 8 x 8 pixels.
class _Mixing:
    """An augmentation step for MixUp or CutMix, in NumPy."""

    def __init__(self, layer):
        self._layer, self._kept = layer, _KEPT[type(layer)]

    def __call__(self, frames, labels, rng):
        frames = [keras.ops.convert_to_numpy(frame) for frame in frames]
        other = rng.permutation(len(frames[0]))
        kept = self._kept(self._layer, frames[0].shape[:3], rng).astype("float32")
        share = kept.mean(axis=(1, 2))[:, None]
        mixed = [_mixed(frame, frame[other], kept[..., None]) for frame in frames]
        return mixed, None if labels is None else _mixed(labels, labels[other], share)


def _mixed(x, other, share):
    return share * x + (1 - share) * other


def _kept_by_mix_up(layer, shape, rng):
    """Returns the share of each image that is kept, `(b, 1, 1)`."""
    return rng.beta(layer.alpha, layer.alpha, (shape[0], 1, 1))


def _kept_by_cut_mix(layer, shape, rng):
    """Returns `(b, h, w)`: 0 inside a random rectangle of each image, else 1."""
    kept = np.ones(shape)
    spread = rng.uniform(*layer.factor) + 1e-6  # as in Keras
    for image, share in zip(kept, rng.beta(spread, spread, shape[0]), strict=True):
        sizes = [round(np.sqrt(1 - share) * size) for size in image.shape]
        top, left = (rng.integers(total - size + 1) for total, size in zip(image.shape, sizes, strict=True))
        image[top : top + sizes[0], left : left + sizes[1]] = 0
    return kept


_KEPT = {keras.layers.MixUp: _kept_by_mix_up, keras.layers.CutMix: _kept_by_cut_mix}


def _checked_images(images):
    if not hasattr(images, "dtype") or images.ndim not in (4, 5) or not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            "Images must be an array of floats from 0 to 1, (b, h, w, c), or clips (b, T, h, w, c). Received: "
            f"{type(images).__name__} of shape {getattr(images, 'shape', None)}, {getattr(images, 'dtype', None)}. "
            "Add an axis for channels, and divide pixels by 255."
        )
    return images.astype("float32", copy=False)


def _checked_layers(given):
    """Yields the layers in order, with containers replaced by their layers."""
    for layer in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(layer, (keras.Sequential, keras.layers.Pipeline, Augmentation)):
            yield from _checked_layers(list(layer.layers))
            continue
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                "An augmentation must be a Keras layer or a list of layers. Received: "
                f"{layer!r}. Pass functions of NumPy arrays as transform."
            )
        for part in (layer, *getattr(layer, "layers", ())):
            name = type(part).__name__
            reason = _REFUSED.get(name)
            if isinstance(part, tuple(_KEPT)) and not (part is layer and type(part) in _KEPT):
                reason = "layers that mix must be keras.layers.MixUp or CutMix themselves, outside of other layers"
            if reason:
                raise ValueError(
                    "Augmentation layers must draw all random numbers from their seeds. Received: "
                    f"{name}; {reason}. Use RandAugment for example, or a transform."
                )
            if tuple(getattr(part, "value_range", None) or (0, 1)) != (0, 1):
                raise ValueError(
                    "value_range must be (0, 1): augmentation gets pixels from 0 to 1. Received: "
                    f"{name} with value_range={part.value_range}. Pass {name}(..., value_range=(0, 1))."
                )
        yield layer

"""Augmentation from Keras' preprocessing layers, as a pure function of a batch and a random generator."""

import threading
from contextlib import nullcontext

import keras
import numpy as np

from keras_jamba import _backend
from keras_jamba.ops import _checks

# Keras is not made for several threads that build or trace one layer. Of all objects: they may share layers.
_TRACING = threading.Lock()

_REFUSED = {
    "AugMix": "it draws from Python's global generator",
    "RandomElasticTransform": "on PyTorch it draws from the global generator",
}


class Augmentation:
    """What Keras' preprocessing layers make of a batch: a pure function of it and a random generator.

    The layers are called with `training=True` on the CPU, and all that they draw follows from seeds that are drawn
    from the generator: what their own generators and the global ones have drawn before has no part in it. They are
    compiled where the backend does that; what cannot be compiled, `RandomCrop` on JAX, is called as it is. The frames
    of a clip are given to the layers one after the other with the same seeds, so that all frames are turned,
    mirrored and coloured alike.

    `MixUp` and `CutMix` mix each image with another of the batch, and their labels by the share of the pixels; clips
    are mixed as wholes. Their numbers have the distributions of Keras' layers, but are drawn and used in NumPy, alike
    on every backend. `RandomCrop` makes images smaller; after `ZeroPadding2D(4)` it shifts them by up to 4 pixels, all
    of a batch alike.

    Args:
        layers: a Keras layer or a list of layers; a `Sequential`, a `Pipeline` and an `Augmentation` stand for
            theirs. Layers with a `value_range` must be told (0, 1), and a `Dropout` needs a seed: without one it
            draws from the global generator on PyTorch.
        num_classes: classes of integer labels, for `MixUp` and `CutMix`; None where labels are one-hot.

    Call arguments:
        batch: images, `(images, labels)` or `(images, labels, sample_weight)`, NumPy arrays. Images `(b, h, w, c)` or
            clips `(b, T, h, w, c)` of floats from 0 to 1; labels of any kind without `MixUp` and `CutMix`, with them
            `(b,)` integers or `(b, num_classes)` floats.
        rng: a `numpy.random.Generator`.

    Returns:
        The batch. Images float32; labels `(b, num_classes)` float32 with `MixUp` or `CutMix`, else as they were.

    Raises:
        ValueError: for what is no layer or draws from other generators than its own, and for a batch that is not
            as described or, with `MixUp` or `CutMix`, has weights.

    Example:
        >>> import keras, numpy as np
        >>> from keras_jamba.training.data import Augmentation, Batches
        >>> images, labels = np.zeros((8, 6, 6, 3), "float32"), np.arange(8) % 2
        >>> transform = Augmentation([keras.layers.RandomFlip(), keras.layers.MixUp()], num_classes=2)
        >>> batches = Batches((images, labels), batch_size=4, transform=transform)
        >>> [part.shape for part in batches.batch(0)]
        [(4, 6, 6, 3), (4, 2)]
    """

    def __init__(self, layers, num_classes=None):
        if num_classes is not None:
            _checks.check_integer("num_classes", num_classes)
        self.layers, self.num_classes = tuple(_checked_layers(layers)), num_classes
        self._mixes = any(type(layer) in _KEPT for layer in self.layers)
        self._steps = [_Mixing(layer) if type(layer) in _KEPT else _Pure(layer) for layer in self.layers]

    def __call__(self, batch, rng):
        parts = batch if isinstance(batch, tuple) else (batch,)
        images, labels, *weights = (*parts, None)[: max(2, len(parts))]
        images = _checked_images(images)
        if self._mixes:
            labels = self._checked_labels(labels, weights)
        frames = [images] if images.ndim == 4 else list(np.moveaxis(images, 1, 0))
        with keras.device("cpu:0"):  # the accelerator trains meanwhile
            for step in self._steps:
                frames, labels = step(frames, labels, rng)
            frames = [np.asarray(keras.ops.convert_to_numpy(frame), "float32") for frame in frames]
        images = frames[0] if images.ndim == 4 else np.stack(frames, axis=1)
        return (images, labels, *weights)[: len(parts)] if isinstance(batch, tuple) else images

    def _checked_labels(self, labels, weights):
        """`(b, num_classes)` float32, or None."""
        if weights:
            raise ValueError(
                "MixUp and CutMix do not know what the weight of a mixed example is. Received: a batch with a "
                "sample_weight. Leave it out, or leave the two layers out."
            )
        if labels is None:
            return None
        labels = np.asarray(labels)
        if np.issubdtype(labels.dtype, np.floating) and labels.ndim == 2:
            if self.num_classes not in (None, labels.shape[1]):
                raise ValueError(
                    f"One-hot labels must have the shape (b, num_classes). Received: labels of shape {labels.shape}, "
                    f"num_classes={self.num_classes}. Change one of the two."
                )
            return labels.astype("float32")
        if self.num_classes is None:
            raise ValueError(
                "MixUp and CutMix mix labels of shape (b, num_classes), floats, or (b,), integers of which num_classes "
                f"is known. Received: labels of shape {labels.shape}, {labels.dtype}, and num_classes=None. "
                "Pass Augmentation(layers, num_classes), or one-hot labels."
            )
        return one_hot(labels, self.num_classes)


def one_hot(labels, num_classes):
    """Integer labels `(b,)` as `(b, num_classes)` float32.

    Raises:
        ValueError: for labels that are not such integers.
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
    """A layer as a step that depends on nothing but images and generator."""

    def __init__(self, layer):
        self._layer, self._compiled = layer, _backend.compilation.jit(self._called)
        # For each shape that came, the function that takes it.
        self._functions = {}

    def __call__(self, frames, labels, rng):
        shape = tuple(frames[0].shape)
        with nullcontext() if self._functions.get(shape) is self._compiled else _TRACING:
            if not self._layer.built:
                self._layer(frames[0], training=False)  # it may make its generators only now
            values = self._values(rng)
            if shape not in self._functions:
                self._functions[shape] = self._found(frames[0], values)
            return [self._functions[shape](frame, values) for frame in frames], labels

    def _values(self, rng):
        """Of all variables of the layer; those that are no weights are states of random generators."""
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
        except Exception:  # whatever a tracer does not let a layer do; an error of the layer's own comes again
            return self._called
        return self._compiled

    def _called(self, images, values):
        variables = self._layer.variables
        with keras.StatelessScope(list(zip(variables, values, strict=True))) as scope:
            images = self._layer(images, training=True)
        if scope.state_mapping.keys() - {id(variable) for variable in variables}:
            raise ValueError(
                "Layers must draw from generators of their own, in which the seed of a step can be set. Received: "
                f"{self._layer!r}, which draws from Keras' global one. Give it a keras.random.SeedGenerator as an "
                "attribute, and its random functions that as seed."
            )
        return images


# Not by calling the layers: on PyTorch these seed the global generators, from which a model draws at the same time, and
# leave CUDA's so. And the label of Keras' CutMix gives the image less than its pixels do, by 0.05 on average for 8 x 8.
class _Mixing:
    """MixUp or CutMix as such a step."""

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
    """`(b, 1, 1)`: what is kept of each image."""
    return rng.beta(layer.alpha, layer.alpha, (shape[0], 1, 1))


def _kept_by_cut_mix(layer, shape, rng):
    """`(b, h, w)`: 0 in a rectangle of each image, else 1."""
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
    """The layers, those of what is a list of layers itself one by one."""
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
                reason = "of what mixes, only Keras' own layers and those by themselves can be given labels"
            if reason:
                raise ValueError(
                    "An augmentation must be layers all of whose numbers follow from seeds. Received: "
                    f"{name}; {reason}. Use RandAugment for example, or a transform."
                )
            if tuple(getattr(part, "value_range", None) or (0, 1)) != (0, 1):
                raise ValueError(
                    "Layers with a value_range must be told that pixels are from 0 to 1. Received: "
                    f"{name} with value_range={part.value_range}. Pass {name}(..., value_range=(0, 1))."
                )
        yield layer

"""Augmentation of photographs in NumPy: shifts, mirror images, erasing and CutMix."""

import math

import numpy as np

from keras_jamba._typing import Tensors
from keras_jamba.ops import _checks
from keras_jamba.training.data.augmentation import mixable_labels

# Random erasing: the share of the area, and the largest ratio of height to width or of width to height.
_ERASED, _LARGEST_RATIO = (0.02, 0.33), 3.3


class PhotoAugmentation:
    """Shifts, mirrors, erases and mixes photographs: a pure function of a batch and a random generator.

    It keeps dtype and range of the pixels, such as uint8 from 0 to 255. NumPy releases the interpreter lock for most of
    the work, so that several threads of `Batches` share it. Use `Augmentation` for Keras' many preprocessing layers,
    which are slower.

    Args:
        shift: the largest shift to each side, as a share of height and width. Pixels from outside are 0.
        mirror: whether half of the images are mirrored from left to right.
        erasing: the share of the images that lose a rectangle of 2 to 33 % of their area. It takes the colour of a
            random pixel of the image.
        cut_mix: the share of the images that get a rectangle of another image of the batch, of 0 to 100 % of their
            area. Labels mix by the share of the pixels.
        num_classes: classes of integer labels, for `cut_mix`; None if labels are one-hot.

    Call arguments:
        batch: images, `(images, labels)` or `(images, labels, sample_weight)`, NumPy arrays. Images are
            `(b, h, w, c)`, or clips `(b, T, h, w, c)`, whose frames are all changed alike. Labels are `(b,)` integers
            or `(b, num_classes)` floats with `cut_mix`, and of any kind without.
        rng: a `numpy.random.Generator`.

    Returns:
        The batch. With `cut_mix`, labels are `(b, num_classes)` float32.

    Raises:
        ValueError: for arguments out of range and images of another shape. With `cut_mix`, also for labels that are not
            as described, and for a sample_weight.

    Reference:
        Erasing: [Zhong et al. (2020)](https://arxiv.org/abs/1708.04896). CutMix:
        [Yun et al. (2019)](https://arxiv.org/abs/1905.04899).

    Example:
        >>> import numpy as np
        >>> from keras_jamba.training.data import Batches, PhotoAugmentation
        >>> images, labels = np.zeros((8, 32, 32, 3), "uint8"), np.arange(8) % 2
        >>> transform = PhotoAugmentation(cut_mix=0.5, num_classes=2)
        >>> batches = Batches((images, labels), batch_size=4, transform=transform, workers=4)
        >>> [part.shape for part in batches.batch(0)]
        [(4, 32, 32, 3), (4, 2)]
    """

    def __init__(
        self,
        shift: float = 0.125,
        mirror: bool = True,
        erasing: float = 0.0,
        cut_mix: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        if not isinstance(mirror, (bool, np.bool_)):
            raise ValueError(
                f"mirror must be True or False. Received: mirror={mirror!r}. True mirrors half of the images."
            )
        for name, value in dict(shift=shift, erasing=erasing, cut_mix=cut_mix).items():
            _checks.check_number(name, value, low=0, high=1)
        if num_classes is not None:
            _checks.check_integer("num_classes", num_classes)
        self.shift, self.mirror, self.erasing, self.cut_mix = shift, bool(mirror), erasing, cut_mix
        self.num_classes = num_classes

    def __call__(self, batch: Tensors, rng: np.random.Generator) -> Tensors:
        parts = batch if isinstance(batch, tuple) else (batch,)
        images, labels, *weights = (*parts, None)[: max(2, len(parts))]
        shape = _checked(images).shape
        # The frames of a clip become channels.
        images = images if images.ndim == 4 else np.moveaxis(images, 1, 3).reshape(shape[0], *shape[2:4], -1)
        images = self._moved(images, rng)
        if self.erasing:
            _erase(images, rng.random(len(images)) < self.erasing, rng)
        if self.cut_mix:
            if labels is None:
                raise ValueError("cut_mix needs labels. Received: a batch of images alone. Pass cut_mix=0, or labels.")
            labels = mixable_labels(labels, weights, self.num_classes, len(images))
            labels = _mix(images, labels, rng.random(len(images)) < self.cut_mix, rng)
        if len(shape) == 5:
            images = np.moveaxis(images.reshape(shape[0], *shape[2:4], shape[1], shape[4]), 3, 1)
        return (images, labels, *weights)[: len(parts)] if isinstance(batch, tuple) else images

    def _moved(self, images, rng):
        """Returns shifted and mirrored images, with zeros from outside."""
        count, *sides, channels = images.shape
        most = [math.floor(self.shift * side) for side in sides]
        padded = np.pad(images, ((0, 0), *((n, n) for n in most), (0, 0)))
        places = [
            np.arange(side) + rng.integers(2 * n + 1, size=(count, 1)) for side, n in zip(sides, most, strict=True)
        ]
        if self.mirror:
            places[1] = np.where(rng.random((count, 1)) < 0.5, places[1][:, ::-1], places[1])
        cells = np.arange(count)[:, None] * padded.shape[1] + places[0]
        cells = cells[:, :, None] * padded.shape[2] + places[1][:, None]
        return padded.reshape(-1, channels).take(cells, axis=0)


def _checked(images):
    if (
        not isinstance(images, np.ndarray)
        or images.ndim not in (4, 5)
        or images.dtype.kind not in "iuf"
        or 0 in images.shape
    ):
        raise ValueError(
            "Images must be a NumPy array (b, h, w, c), or clips (b, T, h, w, c), of floats or integers, without "
            "empty axes. "
            f"Received: {type(images).__name__} of shape {getattr(images, 'shape', None)}, "
            f"{getattr(images, 'dtype', None)}. Add an axis for channels, or convert the pixels."
        )
    return images


def _erase(images, chosen, rng):
    """Fills a rectangle of each chosen image with the colour of one of its pixels."""
    count, *sides, _ = images.shape
    share, ratio = rng.uniform(*_ERASED, count), np.exp(rng.uniform(-1, 1, count) * math.log(_LARGEST_RATIO))
    sizes = np.sqrt(share[:, None] * np.stack([ratio, 1 / ratio], axis=1)) * sides
    sizes = np.clip(np.round(sizes), 1, sides).astype(int)
    rows, columns = (rng.integers(side, size=count) for side in sides)
    for image, inside in _rectangles(sizes, sides, chosen, rng):
        images[image][inside] = images[image, rows[image], columns[image]].copy()


def _mix(images, labels, chosen, rng):
    """Replaces a rectangle of each chosen image by that of another image, and returns labels mixed alike."""
    count, *sides, _ = images.shape
    before, other = images.copy(), rng.permutation(count)
    sizes = np.round(np.sqrt(rng.random(count))[:, None] * sides).astype(int)
    for image, inside in _rectangles(sizes, sides, chosen, rng):
        images[image][inside] = before[other[image]][inside]
    share = np.where(chosen, sizes.prod(axis=1) / np.prod(sides), 0).astype("float32")[:, None]
    return (1 - share) * labels + share * labels[other]


def _rectangles(sizes, sides, chosen, rng):
    """Yields `(image, slices)` for each chosen image: a rectangle of its size `(b, 2)` at a random place inside."""
    first = rng.integers(np.asarray(sides) - sizes + 1)
    ends = first + sizes
    for image in np.flatnonzero(chosen):
        (top, left), (bottom, right) = first[image], ends[image]
        yield image, np.s_[top:bottom, left:right]

"""Labelled pictures or clips from a folder with one subfolder per class."""

import logging
from pathlib import Path
from typing import Literal

import numpy as np

from keras_jamba._typing import PathLike
from keras_jamba.ops import _checks
from keras_jamba.training.data._pictures import MODES, Pictures, check_pillow, is_clip, is_picture
from keras_jamba.training.data.augmentation import Augmentation, Layers
from keras_jamba.training.data.batches import AUGMENTATION, Batches, Transform

_logger = logging.getLogger("keras_jamba")


class ImageFolder(Batches):
    """Labelled pictures or clips from a folder with one subfolder per class, read when their batch is made.

    A picture is stretched to `image_size`. A clip is an animated GIF or WebP, or a folder of pictures, sorted by name
    with numbers by value. Its T frames are the middle frames of T equal parts. Files without a picture suffix, and
    names that begin with a dot, are skipped.

    Augmentation is also a pure function of seed and step, on one backend and machine: see `Augmentation`.

    Args:
        folder: a path. The sorted names of its subfolders are the classes.
        image_size: `(h, w)` in pixels.
        batch_size: pictures or clips b per batch.
        channels: 3 for colour or 1 for grey.
        frames: frames T of a clip, or None for pictures.
        augmentation: an `Augmentation`, a Keras layer or a list of layers, including `MixUp` and `CutMix`. None does
            not augment.
        split: `(low, high)`, shares from 0 to 1 of each class' examples, in a fixed order that no argument changes. Use
            `(0, 0.8)` for training and `(0.8, 1)` for validation. None takes all examples.
        skip_unreadable: whether unreadable files are left out. If so, several threads read every file once when the
            object is made, and batches depend on seed, step and the readable files. False raises an error when the
            batch of an unreadable file is made.
        seed, shuffle, transform, drop_last, workers, max_queue_size, shard: see `Batches`. The transform follows the
            augmentation.

    Attributes:
        class_names: names of the classes, in the order of the labels. `DHCJamba.fit` adopts them.
        unreadable: paths that `skip_unreadable` left out: files, or folders of clips.

    Returns:
        From `batch`: `(pixels, labels)`. pixels are `(b, h, w, channels)`, or `(b, T, h, w, channels)` for clips,
        float32 from 0 to 1. labels are `(b,)` int32, or `(b, classes)` float32 with `MixUp` or `CutMix`.

    Raises:
        ImportError: without pillow.
        ValueError: for arguments out of range, a folder without class subfolders, or layers that `Augmentation`
            refuses. When a batch is made, for an unreadable file. With `skip_unreadable`, for a class without any
            readable file.

    Example:
        ```python
        layers = [keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.05)]
        train = ImageFolder("pictures", (32, 32), batch_size=64, augmentation=layers, split=(0, 0.8), workers=4)
        rest = dict(split=(0.8, 1), shuffle=False, drop_last=False)
        validation = ImageFolder("pictures", (32, 32), batch_size=64, **rest)
        model.fit(train, validation_data=validation, epochs=10)
        ```
    """

    def __init__(
        self,
        folder: PathLike,
        image_size: tuple[int, int] | list[int],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        channels: Literal[1, 3] = 3,
        frames: int | None = None,
        augmentation: Layers | None = None,
        split: tuple[float, float] | list[float] | None = None,
        transform: Transform | None = None,
        drop_last: bool = True,
        workers: int = 1,
        max_queue_size: int = 10,
        shard: tuple[int, int] = (0, 1),
        skip_unreadable: bool = False,
    ) -> None:
        check_pillow()
        height, width = _checked_size(image_size)
        _checks.check_choice("channels", channels, tuple(MODES))
        if frames is not None:
            _checks.check_integer("frames", frames)
        names, paths, labels = _found(Path(folder), is_picture if frames is None else is_clip, split)
        pictures = Pictures(paths, labels, (height, width), channels, frames)
        self.unreadable = ()
        if skip_unreadable:
            pictures, self.unreadable = _readable(pictures, paths, labels, names)
        if augmentation is not None:
            num_classes = getattr(augmentation, "num_classes", None) or len(names)
            augmentation = Augmentation(augmentation, num_classes)
        self._augmentation = augmentation
        super().__init__(pictures, batch_size, seed, shuffle, transform, drop_last, workers, max_queue_size, shard)
        self.class_names = names

    def _transformed(self, batch, step):
        if self._augmentation:
            batch = self._augmentation(batch, self._random(AUGMENTATION, step))
        return super()._transformed(batch, step)


def _checked_size(image_size):
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise ValueError(
            f"image_size must be (h, w) in pixels. Received: image_size={image_size!r}. Pass for example (32, 32)."
        )
    for name, pixels in zip(("the height of image_size", "the width of image_size"), image_size, strict=True):
        _checks.check_integer(name, pixels)
    return image_size


def _found(folder, wanted, split):
    """Returns `(class names, paths, labels)`."""
    low, high = _checked_split(split)
    if not folder.is_dir():
        raise ValueError(f"folder must be a folder. Received: {str(folder)!r}, which is not one. Check the path.")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths, labels = [], []
    for label, name in enumerate(names):
        found = sorted(path for path in (folder / name).iterdir() if wanted(path))
        if not found:
            raise ValueError(
                "Each class must have a picture or, with frames, a clip. Received: "
                f"{str(folder / name)!r}, which has none. Remove the folder, or fill it."
            )
        # A random order, because pictures with similar names are often alike.
        order = np.random.default_rng(label).permutation(len(found))
        part = sorted(order[round(low * len(found)) : round(high * len(found))])
        paths += [found[i] for i in part]
        labels += [label] * len(part)
    if not paths:
        raise ValueError(
            "The folder must hold one folder per class, with pictures. Received: "
            f"{str(folder)!r} with {len(names)} folders and split={split!r}. Sort the files into folders, "
            "or widen split."
        )
    return tuple(names), paths, labels


def _readable(pictures, paths, labels, names):
    """Returns `(pictures, unreadable)`: the readable pictures, and the paths of the others, which are logged."""
    errors = pictures.unreadable()
    unreadable = tuple(paths[i] for i in errors)
    kept = [i for i in range(len(paths)) if i not in errors]
    without = sorted(set(labels) - {labels[i] for i in kept})
    if without:
        first = next(error for i, error in errors.items() if labels[i] == without[0])
        raise ValueError(
            f"Each class must have a file that can be read. Received: class {names[without[0]]!r} with none. "
            f"Replace the files. The first error: {first}"
        ) from first
    if errors:
        named = ", ".join(map(str, unreadable[:5])) + (", ..." if len(errors) > 5 else "")
        _logger.warning("%d of %d files cannot be read and are skipped: %s", len(errors), len(paths), named)
    return pictures.only(kept), unreadable


def _checked_split(split):
    split = (0, 1) if split is None else split
    if not isinstance(split, (tuple, list)) or len(split) != 2 or not 0 <= split[0] < split[1] <= 1:
        raise ValueError(
            f"split must be (low, high), shares with 0 <= low < high <= 1. Received: split={split!r}. "
            "Pass for example (0, 0.8)."
        )
    return split

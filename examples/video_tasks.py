"""Clips of moving, flashing and returning digits, with controls and their highest possible accuracies.

A control removes the information that a task requires: the order of frames, or all frames but the last. A model with
a higher accuracy than the control's ceiling uses a leak. NumPy makes the clips from scikit-learn's digits. They are a
function of the task, the split, the seed and the salt, and equal on every backend.
"""

import functools
import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SPRITE = 8
NOISE = 0.3
SPECKLES = 0.05
# The index of a digit image modulo 5 decides its split.
SPLITS = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}
# (down, right), clockwise: the opposite of d is (d + 4) % 8.
DIRECTIONS = np.array([(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)])
# Row `label` holds the digits in the order they are shown.
ORDERS = np.array(list(itertools.permutations(range(3))))
# The class names per task.
CLASS_NAMES = {
    "direction": ("right", "down right", "down", "down left", "left", "up left", "up", "up right"),
    "order": tuple(", ".join(map(str, order)) for order in ORDERS),
    "match": ("different", "same"),
}


def generator(task, split, seed=0, salt=0):
    """Returns the random generator of a task (any name) and a split."""
    entropy = [zlib.crc32(task.encode()), zlib.crc32(split.encode()), salt, seed]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


@functools.cache
def sprites(split):
    """Returns a split's digit images `(count, 8, 8)` from 0 to 1, sorted by class, and their classes `(count,)`."""
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise ValueError(f"The split must be one of {', '.join(SPLITS)}. Received: {split!r}. Check the spelling.")
    digits = load_digits()
    chosen = np.flatnonzero(np.isin(np.arange(len(digits.target)) % 5, SPLITS[split]))
    chosen = chosen[np.argsort(digits.target[chosen], kind="stable")]
    images, classes = (digits.images[chosen] / 16).astype("float32"), digits.target[chosen]
    images.setflags(write=False)
    classes.setflags(write=False)
    return images, classes


@dataclass(frozen=True)
class Task:
    """Task of video classification.

    `frames` is the default number of frames T, which may be from `shortest` to `longest`. `multiple` divides every
    count of clips. `ceilings` holds the highest possible accuracy in percent, by the name of the control.
    """

    name: str
    classes: int
    frames: int
    size: tuple
    shortest: int
    longest: int | None
    multiple: int
    ceilings: dict
    make: Callable

    def clips(self, split, count, seed=0, salt=0, frames=None):
        """Returns float32 clips `(count, T, h, w, 1)` from 0 to 1, and int32 labels `(count,)`.

        Raises:
            ValueError: if the count is no multiple of `multiple`, or the task does not allow the number of frames.
        """
        frames = self.frames if frames is None else frames
        if count < 1 or count % self.multiple:
            raise ValueError(
                f"The count of clips for {self.name!r} must be a positive multiple of {self.multiple}. "
                f"Received: {count}. Ask for {max(1, -(-count // self.multiple)) * self.multiple}."
            )
        if frames < self.shortest or frames > (self.longest or frames):
            upper = f" to {self.longest}" if self.longest else " or more"
            raise ValueError(
                f"A clip of {self.name!r} must have {self.shortest}{upper} frames. "
                f"Received: frames={frames}. The usual number is {self.frames}."
            )
        rng = generator(self.name, split, seed, salt)
        clips, labels = self.make(rng, *sprites(split), (count, frames, *self.size))
        return clips[..., None], labels.astype("int32")


def _direction(rng, images, _, shape):
    """Returns clips of a digit that moves 2 pixels per frame in one of 8 directions, and rows of DIRECTIONS as labels.

    Clips 2i and 2i + 1 are the same frames in opposite orders. A path is symmetric around its centre, which is at
    most one pixel from the frame's centre in each direction. So frames without their order reveal the axis only. A
    single frame reveals the direction, since the digit comes from the other side: there is no ceiling for it. (Of 8
    frames, even one next to the middle is correct in 25 of 72 cases.)
    """
    count, frames, *size = shape
    axis = _balanced(rng, count // 2, 4)
    forth = axis + 4 * rng.integers(2, size=len(axis))
    digits = images[rng.integers(len(images), size=len(axis))]
    centre = (np.array(size) - SPRITE) // 2 + rng.integers(-1, 2, size=(len(axis), 2))
    travel = 2 * np.arange(frames) - (frames - 1)
    corners = centre[:, None] + travel[:, None] * DIRECTIONS[forth][:, None]
    clips = np.zeros((len(axis), *shape[1:]), "float32")
    _paste(clips, np.arange(frames)[None], corners, digits[:, None])
    both = np.stack([clips, clips[:, ::-1]], axis=1).reshape(shape)
    return both, np.stack([forth, (forth + 4) % 8], axis=1).reshape(-1)


def _order(rng, images, classes, shape):
    """Returns clips of the digits 0, 1 and 2, one frame each at random times and places, and rows of ORDERS as labels.

    Times and places have the same distribution for all orders, so frames without their order reveal nothing. The last
    frame does reveal something if it holds a digit.
    """
    count, frames, *size = shape
    labels = _balanced(rng, count, len(ORDERS))
    digits = ORDERS[labels]
    starts, sizes = _ranges(classes)
    rows = starts[digits] + rng.integers(sizes[digits])
    times = np.sort(np.argsort(rng.random((count, frames)), axis=1, kind="stable")[:, :3], axis=1)
    corners = _corners(rng, (count, 3), size)
    clips = _noise(rng, shape)
    _paste(clips, times, corners, images[rows])
    return clips, labels


def _match(rng, images, classes, shape):
    """Returns clips with a digit in the first and the last frame; label 1 if both are of one class, else 0.

    Both digits are at random places and never the same image. Every class is equally likely first and last, for both
    labels. In the frames between, one of twenty pixels is a speckle between the noise and the brightest value. The
    number of frames changes neither the first nor the last frame, only their distance.
    """
    count, frames, *size = shape
    same = _balanced(rng, count, 2)
    first = rng.integers(10, size=count)
    last = (first + (1 - same) * rng.integers(1, 10, size=count)) % 10
    starts, sizes = _ranges(classes)
    shown = rng.integers(sizes[first])
    another = (shown + rng.integers(1, sizes[first])) % sizes[first]
    rows = np.stack([starts[first] + shown, starts[last] + np.where(same, another, rng.integers(sizes[last]))], axis=1)
    ends = _noise(rng, (count, 2, *size))
    _paste(ends, np.arange(2)[None], _corners(rng, (count, 2), size), images[rows])
    between = _noise(rng, (count, frames - 2, *size))
    speckled = rng.random(between.shape, "float32") < SPECKLES
    between[speckled] = NOISE + (1 - NOISE) * rng.random(np.count_nonzero(speckled), "float32")
    return np.concatenate([ends[:, :1], between, ends[:, 1:]], axis=1), same


def _balanced(rng, count, classes):
    """Returns labels `(count,)` in a random order. Their frequencies differ by at most one."""
    return rng.permutation(np.arange(count) % classes)


def _ranges(classes):
    """Returns the first index and the size of each of the ten classes in sorted `classes`."""
    sizes = np.bincount(classes, minlength=10)
    return np.cumsum(sizes) - sizes, sizes


def _corners(rng, shape, size):
    """Returns upper left corners `(*shape, 2)` of sprites within a frame."""
    return rng.integers(np.array(size) - SPRITE + 1, size=(*shape, 2))


def _noise(rng, shape):
    return NOISE * rng.random(shape, "float32")


def _paste(clips, times, corners, digits):
    """Writes digits `(N, K, 8, 8)` into clips `(N, T, h, w)` where they are brighter.

    `times` has the shape `(N, K)`, `corners` `(N, K, 2)`.
    """
    pixels = corners[..., None] + np.arange(SPRITE)
    clip = np.arange(len(clips))[:, None, None, None]
    where = clip, times[..., None, None], pixels[..., 0, :, None], pixels[..., 1, None, :]
    clips[where] = np.maximum(clips[where], digits)


def shuffled_frames(clips, rng):
    """Returns clips with the frames of each clip in a random order."""
    count, frames = clips.shape[:2]
    order = rng.permuted(np.tile(np.arange(frames), (count, 1)), axis=1)
    return clips[np.arange(count)[:, None], order]


def frame_mean(clips):
    """Returns clips that repeat the mean frame of each clip T times."""
    return np.repeat(clips.mean(axis=1, keepdims=True), clips.shape[1], axis=1)


def only_last(clips):
    """Returns clips that repeat the last frame of each clip T times."""
    return np.repeat(clips[:, -1:], clips.shape[1], axis=1)


# Functions of clips and a generator, by the names in `Task.ceilings`.
CONTROLS = {
    "shuffled": shuffled_frames,
    "mean": lambda clips, rng: frame_mean(clips),
    "last": lambda clips, rng: only_last(clips),
}

TASKS = {
    task.name: task
    for task in (
        # The path of nine frames, shifted by a pixel, would leave the frame.
        Task("direction", 8, 8, (24, 24), 2, 8, 2, {"shuffled": 50.0, "mean": 50.0}, _direction),
        Task("order", 6, 12, (12, 12), 3, None, 1, {"shuffled": 100 / 6, "mean": 100 / 6}, _order),
        Task("match", 2, 16, (12, 12), 2, None, 1, {"last": 50.0}, _match),
    )
}

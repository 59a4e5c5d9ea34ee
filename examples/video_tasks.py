"""Clips of moving, flashing and returning digits, each with controls and what these can score at most.

A control takes away what a task is about, the order of frames or all but the last. A model which scores more
than the control's ceiling has found a leak. Clips are made in NumPy, from scikit-learn's digits: a function of
the task, the split and the numbers given, the same on every backend.
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
# Remainders of a digit image's index by 5.
SPLITS = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}
# (down, right), clockwise: the opposite of d is (d + 4) % 8.
DIRECTIONS = np.array([(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)])
# Row `label` holds the digits in the order they are shown.
ORDERS = np.array(list(itertools.permutations(range(3))))
# The names of the classes, by task.
CLASS_NAMES = {
    "direction": ("right", "down right", "down", "down left", "left", "up left", "up", "up right"),
    "order": tuple(", ".join(map(str, order)) for order in ORDERS),
    "match": ("different", "same"),
}


def generator(task, split, seed=0, salt=0):
    """Random numbers of a task (any name) and a split."""
    entropy = [zlib.crc32(task.encode()), zlib.crc32(split.encode()), salt, seed]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


@functools.cache
def sprites(split):
    """The digit images `(count, 8, 8)` of a split, from 0 to 1, sorted by class, and their classes `(count,)`."""
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
    """`frames`: T unless told, from `shortest` to `longest`. `ceilings`: percent a control may score, by its name."""

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
        """Clips `(count, T, h, w, 1)` from 0 to 1 in float32, and labels `(count,)` in int32."""
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
    """A digit moves 2 pixels a frame, up, down, left, right or diagonally; the label is the row of DIRECTIONS.

    Clips 2i and 2i + 1 are the same frames in opposite orders: a path has its middle as its centre, which is that
    of the frame but for a pixel either way. So frames without their order tell the axis and no more. One frame
    does tell the direction, since the digit comes from the other side: no ceiling is stated for it. (Of 8 frames,
    even one next to the middle is right in 25 of 72 cases.)
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
    """A 0, a 1 and a 2 flash for a frame each, at three random times and random places; the label is the row of ORDERS.

    Times and places are drawn alike for all orders: frames without their order tell nothing. The last frame does,
    when it holds a digit.
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
    """A digit in the first frame and one in the last, at random places; 1 if they are of one class, else 0.

    They are never the same image. Each class is as likely first, and as likely last, whatever the label. In the
    frames between, one pixel of twenty is a speckle between the noise and a digit's brightest. The first and the
    last frame are the same for any number of frames: only the wait differs.
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
    """Labels `(count,)` in a random order, each as often as any other, or once more."""
    return rng.permutation(np.arange(count) % classes)


def _ranges(classes):
    """Where each of the ten classes starts in sorted `classes`, and how many it has."""
    sizes = np.bincount(classes, minlength=10)
    return np.cumsum(sizes) - sizes, sizes


def _corners(rng, shape, size):
    """Upper left corners `(*shape, 2)` of sprites which lie within a frame."""
    return rng.integers(np.array(size) - SPRITE + 1, size=(*shape, 2))


def _noise(rng, shape):
    return NOISE * rng.random(shape, "float32")


def _paste(clips, times, corners, digits):
    """Puts digits `(N, K, 8, 8)` where brighter into clips `(N, T, h, w)`: at times `(N, K)`, corners `(N, K, 2)`."""
    pixels = corners[..., None] + np.arange(SPRITE)
    clip = np.arange(len(clips))[:, None, None, None]
    where = clip, times[..., None, None], pixels[..., 0, :, None], pixels[..., 1, None, :]
    clips[where] = np.maximum(clips[where], digits)


def shuffled_frames(clips, rng):
    """Each clip's frames in a random order of its own."""
    count, frames = clips.shape[:2]
    order = rng.permuted(np.tile(np.arange(frames), (count, 1)), axis=1)
    return clips[np.arange(count)[:, None], order]


def frame_mean(clips):
    """Each clip's mean frame, T times."""
    return np.repeat(clips.mean(axis=1, keepdims=True), clips.shape[1], axis=1)


def only_last(clips):
    """Each clip's last frame, T times."""
    return np.repeat(clips[:, -1:], clips.shape[1], axis=1)


# By the names in `Task.ceilings`; called with clips and a generator.
CONTROLS = {
    "shuffled": shuffled_frames,
    "mean": lambda clips, rng: frame_mean(clips),
    "last": lambda clips, rng: only_last(clips),
}

TASKS = {
    task.name: task
    for task in (
        # Nine frames with a pixel either way would leave the frame.
        Task("direction", 8, 8, (24, 24), 2, 8, 2, {"shuffled": 50.0, "mean": 50.0}, _direction),
        Task("order", 6, 12, (12, 12), 3, None, 1, {"shuffled": 100 / 6, "mean": 100 / 6}, _order),
        Task("match", 2, 16, (12, 12), 2, None, 1, {"last": 50.0}, _match),
    )
}

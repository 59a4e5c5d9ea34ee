"""Arrays in pieces and a little JSON in a folder that appears whole or not at all: what one process saves."""

import hashlib
import json
import math
from pathlib import Path

import ml_dtypes  # noqa: F401, tells NumPy what "bfloat16" is
import numpy as np

from keras_jamba import _files

ARRAYS, STATE = "arrays.bin", "state.json"
FORMAT = 2
_PREFIX = "step_"
# Of version 1: whole arrays.
_NPZ = "arrays.npz"
_ALIGNMENT = 64


class Saved:
    """An array that lies on the disk in pieces, and is read where it is asked for.

    Args:
        shape: of the whole.
        pieces: `(start, array)` of each: where it begins along each axis, and a NumPy array, mapped or in memory.
    """

    def __init__(self, shape, pieces):
        self.shape, self.pieces = tuple(shape), pieces

    @property
    def is_whole(self):
        """Whether the pieces, of which those that begin alike are copies, make up all of it."""
        sizes = {start: piece.size for start, piece in self.pieces}
        return bool(sizes) and sum(sizes.values()) >= math.prod(self.shape)

    def read(self, index=None):
        """A part of it as a NumPy array of its own.

        Args:
            index: a slice without a step for each axis; None for all of it.
        """
        index = (slice(None),) * len(self.shape) if index is None else index
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        begin, end = [a for a, _ in bounds], [b for _, b in bounds]
        found = None
        for start, piece in self.pieces:
            low = [max(*pair) for pair in zip(begin, start, strict=True)]
            high = [min(e, s + n) for e, s, n in zip(end, start, piece.shape, strict=True)]
            of_piece = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            if low == begin and high == end:
                return np.array(piece[of_piece])
            if all(a < b for a, b in zip(low, high, strict=True)):
                if found is None:
                    found = np.empty([b - a for a, b in bounds], piece.dtype)
                found[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, begin, strict=True))] = piece[of_piece]
        return found


def as_single_shard(x):
    """A NumPy array as what `write` takes."""
    return x.shape, [((0,) * x.ndim, x)]


def steps(folder):
    """The steps that snapshots were taken at, in order."""
    _files.restore(folder)
    found = (path.parent.name.removeprefix(_PREFIX) for path in Path(folder).glob(f"{_PREFIX}*/{STATE}"))
    return sorted(int(step) for step in found if step.isdigit())


def place_of(folder, step):
    return Path(folder) / f"{_PREFIX}{step:08d}"


def write(folder, step, arrays, state):
    """Writes a snapshot.

    Args:
        folder: made where it is not there.
        step: names the snapshot.
        arrays: `(shape, pieces)` of each, where `pieces` are `(start, array)`: where each begins along each axis, and
            a NumPy array of any dtype. One piece after the other is asked for and written, none is kept.
        state: what JSON can hold.
    """
    # One is there when a step is saved again, or of a run whose later steps were thrown away.
    with _files.atomic_folder(place_of(folder, step), replaces=True, flushes=True) as staged:
        with open(staged / ARRAYS, "wb") as file:
            sha256, places = _write_arrays(file, arrays)
        with open(staged / STATE, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "sha256": sha256, "arrays": places} | state, file)


def _write_arrays(file, arrays):
    """Returns the sha256 of all, and of each array `[shape, [[start, shape, dtype, offset], ...]]`."""
    hashed, places, offset = hashlib.sha256(), [], 0
    for shape, pieces in arrays:
        found = []
        for start, x in pieces:
            found.append([list(start), list(x.shape), x.dtype.name, offset])
            # bfloat16 is none of NumPy's own types, which alone can be written.
            content = np.ascontiguousarray(x).reshape(-1).view("uint8")
            for part in (content, bytes(-content.size % _ALIGNMENT)):
                file.write(part)
                hashed.update(part)
                offset += len(part)
        places.append([list(shape), found])
    return hashed.hexdigest(), places


def read_state(folder, step):
    """What was given to `write` as state, and a little more.

    Raises:
        ValueError: if it was written by another version.
    """
    place = place_of(folder, step)
    state = json.loads((place / STATE).read_text(encoding="utf-8"))
    if state.get("format") not in (1, FORMAT):
        raise ValueError(
            f"A snapshot must have a format from 1 to {FORMAT}. Received: format={state.get('format')!r} in "
            f"{str(place)!r}. Go on with the version that wrote it, or remove it to begin anew."
        )
    return state


def is_as_written(folder, step):
    """Whether the arrays of a snapshot have not changed since."""
    state, place = read_state(folder, step), place_of(folder, step)
    file = place / (_NPZ if state["format"] == 1 else ARRAYS)
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == state["sha256"]


def read(folder, step):
    """`(arrays, state)` of the snapshot of a step: `Saved` arrays, some of which may have no pieces here, and a dict.

    Raises:
        ValueError: if it was written by another version.
    """
    state, place = read_state(folder, step), place_of(folder, step)
    if state["format"] == 1:
        return _read_npz(place / _NPZ, state["arrays"]), state
    file = place / ARRAYS
    content = np.memmap(file, "uint8", "r") if file.stat().st_size else np.empty(0, "uint8")

    def piece(start, shape, dtype, offset):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return tuple(start), content[offset : offset + size].view(dtype).reshape(shape)

    return [Saved(shape, [piece(*stored) for stored in pieces]) for shape, pieces in state["arrays"]], state


def _read_npz(file, places):
    with np.load(file) as loaded:
        arrays = [loaded[f"arr_{i}"] for i in range(len(places))]
    return [
        Saved(shape, [((0,) * len(shape), x.view(dtype).reshape(shape))])
        for x, (shape, dtype) in zip(arrays, places, strict=True)
    ]


def remove_before(folder, step):
    """Removes the snapshots of earlier steps, and what was left of any that were not finished."""
    for earlier in (found for found in steps(folder) if found < step):
        _files.remove_folder(place_of(folder, earlier))
    # Earlier versions gave what they had begun eight characters as its name.
    for names in (f"{_PREFIX}*", "?" * 8):
        _files.remove_leftovers(folder, names)

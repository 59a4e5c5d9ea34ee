"""Snapshots: arrays in chunks and a JSON state that one process writes to a folder atomically."""

import hashlib
import json
import math
from pathlib import Path

import ml_dtypes  # noqa: F401, registers "bfloat16" with NumPy
import numpy as np

from keras_jamba import _files

ARRAYS, STATE = "arrays.bin", "state.json"
FORMAT = 2
_PREFIX = "step_"
# Format 1 stores complete arrays.
_NPZ = "arrays.npz"
_ALIGNMENT = 64


class Saved:
    """An array stored in chunks, which reads any part of itself on request.

    Args:
        shape: the shape of the complete array.
        chunks: a list of `(start, array)`: the chunk's first index along each axis, and a NumPy array, which may be
            memory-mapped.
    """

    def __init__(self, shape, chunks):
        self.shape, self.chunks = tuple(shape), chunks

    @property
    def is_complete(self):
        """Whether the chunks cover the complete array. Chunks with the same start are copies."""
        sizes = {start: chunk.size for start, chunk in self.chunks}
        return bool(sizes) and sum(sizes.values()) >= math.prod(self.shape)

    def read(self, index=None):
        """Returns a part of the array as a new NumPy array.

        Args:
            index: one slice without a step per axis; None for the complete array.
        """
        index = (slice(None),) * len(self.shape) if index is None else index
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        begin, end = [a for a, _ in bounds], [b for _, b in bounds]
        found = None
        for start, chunk in self.chunks:
            low = [max(*pair) for pair in zip(begin, start, strict=True)]
            high = [min(e, s + n) for e, s, n in zip(end, start, chunk.shape, strict=True)]
            in_chunk = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            if low == begin and high == end:
                return np.array(chunk[in_chunk])
            if all(a < b for a, b in zip(low, high, strict=True)):
                if found is None:
                    found = np.empty([b - a for a, b in bounds], chunk.dtype)
                found[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, begin, strict=True))] = chunk[in_chunk]
        return found


def as_single_shard(x):
    """Returns a NumPy array in the form that `write` takes, `(shape, chunks)` with one chunk."""
    return x.shape, [((0,) * x.ndim, x)]


def steps(folder):
    """Returns the steps of all snapshots in ascending order."""
    _files.restore(folder)
    found = (path.parent.name.removeprefix(_PREFIX) for path in Path(folder).glob(f"{_PREFIX}*/{STATE}"))
    return sorted(int(step) for step in found if step.isdigit())


def place_of(folder, step):
    """Returns the folder of the snapshot of a step."""
    return Path(folder) / f"{_PREFIX}{step:08d}"


def write(folder, step, arrays, state):
    """Writes a snapshot.

    Args:
        folder: a folder, created if absent.
        step: the step, which names the snapshot.
        arrays: an iterable of `(shape, chunks)`. `chunks` yields `(start, array)`: the chunk's first index along each
            axis, and a NumPy array of any dtype. Chunks are written one by one and not kept in memory.
        state: a dict that JSON can hold.
    """
    # Replaces the snapshot if a step is saved again, such as after resuming from an earlier step.
    with _files.atomic_folder(place_of(folder, step), replaces=True, flushes=True) as staged:
        with open(staged / ARRAYS, "wb") as file:
            sha256, places = _write_arrays(file, arrays)
        with open(staged / STATE, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "sha256": sha256, "arrays": places} | state, file)


def _write_arrays(file, arrays):
    """Returns the sha256 of the file, and `[shape, [[start, shape, dtype, offset], ...]]` per array."""
    hashed, places, offset = hashlib.sha256(), [], 0
    for shape, chunks in arrays:
        found = []
        for start, x in chunks:
            found.append([list(start), list(x.shape), x.dtype.name, offset])
            # NumPy writes only its own types, and bfloat16 is not one.
            content = np.ascontiguousarray(x).reshape(-1).view("uint8")
            for part in (content, bytes(-content.size % _ALIGNMENT)):
                file.write(part)
                hashed.update(part)
                offset += len(part)
        places.append([list(shape), found])
    return hashed.hexdigest(), places


def read_state(folder, step):
    """Returns the state given to `write`, with the format, the sha256 and the layout of the arrays.

    Raises:
        ValueError: if another version wrote the snapshot.
    """
    place = place_of(folder, step)
    state = json.loads((place / STATE).read_text(encoding="utf-8"))
    if state.get("format") not in (1, FORMAT):
        raise ValueError(
            f"A snapshot must have a format from 1 to {FORMAT}. Received: format={state.get('format')!r} in "
            f"{str(place)!r}. Use the version that wrote it, or remove it to start from the beginning."
        )
    return state


def is_as_written(folder, step):
    """Checks whether the arrays of a snapshot still match their sha256."""
    state, place = read_state(folder, step), place_of(folder, step)
    file = place / (_NPZ if state["format"] == 1 else ARRAYS)
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == state["sha256"]


def read(folder, step):
    """Returns `(arrays, state)` of a snapshot: `Saved` arrays, which may have no chunks here, and a dict.

    Raises:
        ValueError: if another version wrote the snapshot.
    """
    state, place = read_state(folder, step), place_of(folder, step)
    if state["format"] == 1:
        return _read_npz(place / _NPZ, state["arrays"]), state
    file = place / ARRAYS
    content = np.memmap(file, "uint8", "r") if file.stat().st_size else np.empty(0, "uint8")

    def chunk(start, shape, dtype, offset):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return tuple(start), content[offset : offset + size].view(dtype).reshape(shape)

    return [Saved(shape, [chunk(*stored) for stored in chunks]) for shape, chunks in state["arrays"]], state


def _read_npz(file, places):
    with np.load(file) as loaded:
        arrays = [loaded[f"arr_{i}"] for i in range(len(places))]
    return [
        Saved(shape, [((0,) * len(shape), x.view(dtype).reshape(shape))])
        for x, (shape, dtype) in zip(arrays, places, strict=True)
    ]


def remove_before(folder, step):
    """Removes the snapshots of earlier steps and the remains of unfinished ones."""
    for earlier in (found for found in steps(folder) if found < step):
        _files.remove_folder(place_of(folder, earlier))
    # Earlier versions gave unfinished folders random names of eight characters.
    for names in (f"{_PREFIX}*", "?" * 8):
        _files.remove_leftovers(folder, names)

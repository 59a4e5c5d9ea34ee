"""Snapshots: arrays in chunks and a JSON state that one process writes to a folder atomically."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import stat
from pathlib import Path

import ml_dtypes  # noqa: F401, registers "bfloat16" with NumPy
import numpy as np

from keras_jamba import _checksums, _files, _npz

ARRAYS, STATE = "arrays.bin", "state.json"
# Formats 1 and 2 have no checksum of the state.
FORMAT = 3
_PREFIX = "step_"
_logger = logging.getLogger("keras_jamba")
# Format 1 stores complete arrays.
_NPZ = "arrays.npz"
_ALIGNMENT = 64
# Errors of a path that does not exist, or is not of the kind that a snapshot has there.
_LOST = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


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


def folders_in(folder):
    """Returns the names of the folders and links in a folder, or an empty list if it does not exist.

    Raises:
        OSError: if it cannot be read. A NotADirectoryError if it is a file, or behind a link to a lost folder.
    """
    try:
        with _reading(folder), os.scandir(folder) as entries:
            # A link may have lost its target.
            return [entry.name for entry in entries if entry.is_symlink() or entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError) as error:
        links = [path for path in (Path(folder), *Path(folder).parents) if path.is_symlink() and not path.exists()]
        if isinstance(error, FileNotFoundError) and not links:
            return []
        found = f"a link to a lost folder, {str(links[0])!r}" if links else "a file"
        message = f"The saves of a training need a folder. Received: {found}. Pass another folder to Checkpoint"
        raise NotADirectoryError(errno.ENOTDIR, message, str(folder)) from error


@contextlib.contextmanager
def _reading(path):
    """Raises an OSError with a remedy for a path that exists, but cannot be read in the body."""
    try:
        yield
    except _LOST:
        raise
    except OSError as error:
        message = (
            f"{error.strerror}. A training resumes only if it can read all of its saves. Make this path readable, and "
            "the folders above it, or save into another folder"
        )
        raise OSError(error.errno, message, str(error.filename or path)) from error


def steps(folder):
    """Returns the steps of all snapshots, also of damaged ones, in ascending order.

    Raises:
        OSError: see `folders_in`.
    """
    _files.restore(folder)
    names = [name for name in folders_in(folder) if re.fullmatch(_PREFIX + "[0-9]{8,}", name)]
    found = {int(name.removeprefix(_PREFIX)): name for name in names}
    # Other names, such as step_8, are folders of the user.
    return sorted(step for step, name in found.items() if place_of(folder, step).name == name)


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
    with _files.atomic_folder(place_of(folder, step), replaces=True) as staged:
        with open(staged / ARRAYS, "wb") as file:
            sha256, places = _write_arrays(file, arrays)
        state = {"format": FORMAT, "sha256": sha256, "arrays": places} | state
        (staged / STATE).write_text(json.dumps(_checksums.sealed(state)), encoding="utf-8")


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
        ValueError: if a newer version wrote the snapshot, or if its state has changed or is lost.
        OSError: if its state, or the size of its arrays, cannot be read.
    """
    place = place_of(folder, step)
    try:
        with _reading(place / STATE):
            state = _files.read_json(place / STATE)
        number = state.get("format") if isinstance(state, dict) else None
    except (*_LOST, ValueError) as error:
        raise damaged(place, f"{STATE} that cannot be read: {error}") from error
    if type(number) is int and number > FORMAT:
        raise ValueError(
            f"A save must have a format from 1 to {FORMAT}, which this version of keras-jamba reads. Received: format "
            f"{number} in {str(place / STATE)!r}, which a newer version wrote. Update keras-jamba, or save into "
            "another folder."
        )
    if type(number) is not int or number < 1:
        raise damaged(place, f"{STATE} without a valid format")
    if not _checksums.matches(state, required=state["format"] == FORMAT):
        raise damaged(place, f"{STATE} that does not match its checksum")
    if state["format"] > 1 and (problem := _layout_problem(state, place)) is not None:
        raise damaged(place, problem)
    return state


def _layout_problem(state, place):
    """Returns what is wrong in the table of arrays, or None.

    All chunks must lie inside the file, one after another, and inside their arrays.
    """
    try:
        with _reading(place / ARRAYS):
            size, end = (place / ARRAYS).stat().st_size, 0
        for shape, chunks in state["arrays"]:
            for start, extent, dtype, offset in chunks:
                numbers = [*shape, *start, *extent, offset]
                fits = all(type(n) is int and n >= 0 for n in numbers) and len(shape) == len(start) == len(extent)
                if not fits or any(a + n > most for a, n, most in zip(start, extent, shape, strict=True)):
                    return f"a chunk {[start, extent]} of an array {shape}"
                if not isinstance(dtype, str) or np.dtype(dtype).hasobject or offset < end:
                    return f"a chunk of {dtype} at byte {offset}, before byte {end}"
                end = offset + math.prod(extent) * np.dtype(dtype).itemsize
    except (*_LOST, KeyError, TypeError, ValueError) as error:
        return f"{STATE} without a valid table of arrays: {error!r}"
    return f"{ARRAYS} of {size} bytes, of which {end} are needed" if end > size else None


def damaged(place, found):
    """Returns the ValueError for a snapshot with `found` in its folder `place`."""
    return ValueError(
        f"A save must be as it was written. Received: {str(place)!r} with {found}. Remove this folder: training then "
        "resumes from the previous save, if there is one."
    )


def is_as_written(folder, step):
    """Checks whether the arrays of a snapshot still match their sha256.

    Raises:
        ValueError, OSError: see `read_state`. Also an OSError if the arrays cannot be read.
    """
    state, place = read_state(folder, step), place_of(folder, step)
    file = place / (_NPZ if state["format"] == 1 else ARRAYS)
    try:
        with _reading(file):
            if not stat.S_ISREG(file.stat().st_mode):
                return False
            with open(file, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() == state["sha256"]
    except _LOST:
        return False


def read(folder, step):
    """Returns `(arrays, state)` of a snapshot: `Saved` arrays, which may have no chunks here, and a dict.

    Raises:
        ValueError, OSError: see `read_state`.
    """
    state, place = read_state(folder, step), place_of(folder, step)
    if state["format"] < FORMAT:
        _logger.warning("%s was written without a checksum of its state; the next save has one.", place)
    file = place / (_NPZ if state["format"] == 1 else ARRAYS)
    with _reading(file), open(file, "rb") as stream:
        if state["format"] == 1:
            return _read_npz(file, state["arrays"]), state
        content = np.memmap(stream, "uint8", "r") if file.stat().st_size else np.empty(0, "uint8")

    def chunk(start, shape, dtype, offset):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return tuple(start), content[offset : offset + size].view(dtype).reshape(shape)

    return [Saved(shape, [chunk(*stored) for stored in chunks]) for shape, chunks in state["arrays"]], state


def _read_npz(file, places):
    try:
        loaded = _npz.read(file)
        arrays = [loaded[f"arr_{i}"] for i in range(len(places))]
        return [
            Saved(shape, [((0,) * len(shape), x.view(dtype).reshape(shape))])
            for x, (shape, dtype) in zip(arrays, places, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(file.parent, f"{_NPZ} that does not fit its state: {error!r}") from error


def remove_before(folder, step):
    """Removes the snapshots of earlier steps and the remains of unfinished ones."""
    for earlier in (found for found in steps(folder) if found < step):
        _files.remove_folder(place_of(folder, earlier))
    # Earlier versions gave unfinished folders random names of eight characters.
    for names in (f"{_PREFIX}*", "?" * 8):
        _files.remove_leftovers(folder, names)

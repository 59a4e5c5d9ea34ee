"""Arrays and a little JSON in a folder that appears whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

ARRAYS, STATE = "arrays.npz", "state.json"
FORMAT = 1
_PREFIX, _UNFINISHED = "step_", ".unfinished-"


def steps(folder):
    """The steps that snapshots were taken at, in order."""
    found = (path.parent.name.removeprefix(_PREFIX) for path in Path(folder).glob(f"{_PREFIX}*/{STATE}"))
    return sorted(int(step) for step in found if step.isdigit())


def write(folder, step, arrays, state, keep):
    """Writes a snapshot, then removes all but the last `keep`.

    Args:
        folder: made where it is not there.
        step: names the snapshot.
        arrays: NumPy arrays of any dtype.
        state: what JSON can hold.
        keep: a count.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        with open(staging / ARRAYS, "wb") as file:
            np.savez(file, *map(_bytes, arrays))
            _flush(file)
        signature = {"format": FORMAT, "sha256": _sha256(staging / ARRAYS), "arrays": [_spec(x) for x in arrays]}
        with open(staging / STATE, "w", encoding="utf-8") as file:
            json.dump(signature | state, file)
            _flush(file)
        staging.chmod(0o755)
        place = folder / f"{_PREFIX}{step:08d}"
        if place.exists():  # of a run whose later steps were thrown away
            os.replace(place, folder / f"{_UNFINISHED}{step:08d}")
        os.replace(staging, place)
        _flush_folder(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _remove_old(folder, keep)


def read(folder, step):
    """`(arrays, state)` of the snapshot of a step.

    Raises:
        ValueError: if it was written by another version, or changed after it was written.
    """
    place = Path(folder) / f"{_PREFIX}{step:08d}"
    state = json.loads((place / STATE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ValueError(
            f"A snapshot must have format={FORMAT}. Received: format={state.get('format')!r} in {str(place)!r}. "
            "Go on with the version that wrote it, or remove it to begin anew."
        )
    if not (place / ARRAYS).is_file() or _sha256(place / ARRAYS) != state["sha256"]:
        raise ValueError(
            f"A snapshot must be as it was written, sha256 {state['sha256']}. Received: {str(place)!r}, which is "
            "not. Remove it: the one before it, if there is one, is taken then."
        )
    with np.load(place / ARRAYS) as loaded:
        arrays = [loaded[f"arr_{i}"] for i in range(len(state["arrays"]))]
    return [x.view(dtype).reshape(shape) for x, (shape, dtype) in zip(arrays, state["arrays"], strict=True)], state


def _bytes(x):
    # bfloat16 is none of NumPy's own types: its files know bytes.
    return np.ascontiguousarray(x).reshape(-1).view("uint8")


def _spec(x):
    return [list(x.shape), x.dtype.name]


def _flush(file):
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder):
    """The renaming itself, where folders can be flushed."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_old(folder, keep):
    # Renamed first: what is killed while it removes files leaves nothing that looks whole.
    for step in steps(folder)[:-keep]:
        os.replace(folder / f"{_PREFIX}{step:08d}", folder / f"{_UNFINISHED}{step:08d}")
    for unfinished in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _sha256(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

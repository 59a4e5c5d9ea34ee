"""Saves of a training: the snapshots of all processes that trained together, combined.

A single process writes its snapshots to the folder itself. Several processes write to `process_0`, `process_1` and so
on.
"""

import logging
import random
import re
from pathlib import Path

import numpy as np

from keras_jamba.training.checkpointing import _snapshots

_PROCESS = "process_"
_COUNTS = ("processes", "variables", "epoch", "step_in_epoch", "run")
_TYPES = {"stopped": bool, "data": dict, "python": list, "numpy": list}
# Saves of earlier versions lack these.
_TYPES |= {"model": str, "arguments": dict, "optimizer": str, "kinds": list}
_logger = logging.getLogger("keras_jamba")


def folders(folder, count):
    """Returns the snapshot folder of each of `count` processes."""
    folder = Path(folder)
    return [folder / f"{_PROCESS}{i}" for i in range(count)] if count > 1 else [folder]


def last(folder, count):
    """Returns the last save that all of its processes have written.

    Args:
        folder: the folder of the training.
        count: the number of processes that continue. A save of as many processes wins if several have the same step.

    Returns:
        `(step, processes)`, or None.

    Raises:
        ValueError: if a save is damaged, or of a newer format, and no later save is complete. Such earlier saves are
            logged.
        OSError: if the folder is a file, or if a folder or state cannot be read.
    """
    for place in folders(folder, count):
        _snapshots.folders_in(place)  # an error before the training, not at its first save
    found, broken = _complete(folder)
    newest = max((step for step, _ in found), default=-1)
    for step, error in sorted(broken.items(), reverse=True):
        if step > newest:
            raise error
        _logger.warning("Checkpoint passes over the save of step %d. %s", step, error)
    if not found and any(map(_snapshots.steps, _all(folder))):
        _logger.warning(
            "Checkpoint starts from the beginning: no save in %r has the snapshots of all its processes.", str(folder)
        )
    return max(found, key=lambda save: (save[0], save[1] == count), default=None)


def damaged(places, step):
    """Returns the folder of the first snapshot of `step` that has changed since it was written, or None.

    Raises:
        OSError: if its arrays cannot be read.
    """
    changed = (place for place in places if not _snapshots.is_as_written(place, step))
    return next((_snapshots.place_of(place, step) for place in changed), None)


def read(places, step, index):
    """Reads a save for one of the processes that continue.

    Args:
        places: the folders of the processes that wrote the save.
        step: the step of the save.
        index: the index of the process that reads.

    Returns:
        `(arrays, own, state)`: the variables, assembled from the chunks of all processes; the arrays of process `index`
        alone; and its state. Chunks of process `index` take precedence. If it wrote nothing, process 0 replaces it.

    Raises:
        ValueError: if chunks are missing.
    """
    index = index if index < len(places) else 0
    order = [index, *(i for i in range(len(places)) if i != index)]
    snapshots = [_snapshots.read(places[i], step) for i in order]
    own, state = snapshots[0]
    count = state["variables"]
    if any(len(arrays) < count for arrays, _ in snapshots):
        raise _snapshots.damaged(_snapshots.place_of(places[index], step), f"fewer than {count} variables")
    parts = zip(*(arrays[:count] for arrays, _ in snapshots), strict=True)
    arrays = [_snapshots.Saved(each[0].shape, [chunk for x in each for chunk in x.chunks]) for each in parts]
    missing = [place for place, x in enumerate(arrays) if not x.is_complete]
    if missing:
        raise ValueError(
            "The saved chunks of a variable must cover all of it. Received: step "
            f"{step} in {[str(place) for place in places]}, where variable {missing[0]} lacks some. Remove this step "
            "there: training then resumes from the previous save, if there is one."
        )
    return arrays, own[count:], state


def random_states(state, place):
    """Returns the states of Python's and NumPy's generators in a save.

    Raises:
        ValueError: if a generator does not accept its state.
    """
    try:
        version, internal, gauss = state["python"]
        python, numpy = (version, tuple(internal), gauss), tuple(state["numpy"])
        random.Random().setstate(python)
        np.random.RandomState().set_state(numpy)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise _snapshots.damaged(place, f"an invalid state of a random generator: {error!r}") from error
    return python, numpy


def remove_old(folder, count, index, step, keep):
    """Removes all but the last `keep` saves up to a step that all processes have saved.

    Args:
        folder: the folder of the training.
        count, index: the number of processes, and the index of this one, which removes its own snapshots. Process 0
            also removes the snapshots of processes that no longer train.
        step: the step just saved. Later saves, of an interrupted run, stay.
        keep: the number of saves to keep.
    """
    places = folders(folder, count)
    written = {found for place in _all(folder) for found in _snapshots.steps(place) if found <= step}
    oldest = sorted(written)[-keep:][0]
    others = [place for place in _all(folder) if place not in places] if index == 0 else []
    for place in (places[index], *others):
        _snapshots.remove_before(place, oldest)


def _complete(folder):
    """Returns `(step, processes)` of each save that all of its processes have written, and `{step: error}`."""
    written, broken, places = {}, {}, _all(folder)
    for place in places:
        for step in _snapshots.steps(place):
            try:
                state = _state(place, step)
            except ValueError as error:
                broken[step] = error
                continue
            # Format 1 does not store the number of processes.
            processes = state.get("processes", 1 if place == Path(folder) else len(places) - 1)
            written.setdefault((step, processes, state.get("run")), set()).add(place)
    complete = lambda n, by: n <= len(places) and by >= set(folders(folder, n))  # noqa: E731
    found = [(step, n) for (step, n, _), by in written.items() if complete(n, by)]
    return found, broken


def _state(place, step):
    """Returns the state of a snapshot; raises ValueError for a field of a wrong type."""
    state = _snapshots.read_state(place, step)
    wrong = [name for name in _COUNTS if name in state and not (type(state[name]) is int and state[name] >= 0)]
    wrong += [name for name in ("variables", "sha256") if name not in state]
    wrong += [name for name, kind in _TYPES.items() if name in state and type(state[name]) is not kind]
    if wrong or state.get("processes") == 0:
        raise _snapshots.damaged(_snapshots.place_of(place, step), f"a wrong {(*wrong, 'processes')[0]} in its state")
    return state


def _all(folder):
    """Returns the folder itself and the folders of processes in it."""
    names = [name for name in _snapshots.folders_in(folder) if re.fullmatch(_PROCESS + "[0-9]+", name)]
    return [Path(folder), *(Path(folder) / name for name in sorted(names))]

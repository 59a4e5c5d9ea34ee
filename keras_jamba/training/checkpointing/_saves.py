"""A save of a training: the snapshots of all processes that trained together, read as one.

One process has its snapshots in the folder itself, one of several in `process_0`, `process_1` and so on.
"""

import logging
from pathlib import Path

from keras_jamba.training.checkpointing import _snapshots

_PROCESS = "process_"
_logger = logging.getLogger("keras_jamba")


def folders(folder, count):
    """Where each of so many processes has its snapshots."""
    folder = Path(folder)
    return [folder / f"{_PROCESS}{i}" for i in range(count)] if count > 1 else [folder]


def last(folder, count):
    """The last save that all of its processes have written.

    Args:
        folder: of the training.
        count: the number of processes that go on, preferred where several numbers wrote the same step.

    Returns:
        `(step, processes)`, or None.
    """
    found = _whole(folder)
    if not found and any(map(_snapshots.steps, _all(folder))):
        _logger.warning("Checkpoint begins anew: no save in %r has the parts of all its processes.", str(folder))
    return max(found, key=lambda save: (save[0], save[1] == count), default=None)


def damaged(places, step):
    """The folder of the first of the snapshots of a step that has changed since it was written, or None."""
    changed = (place for place in places if not _snapshots.is_as_written(place, step))
    return next((_snapshots.place_of(place, step) for place in changed), None)


def read(places, step, index):
    """A save as one of the processes that go on sees it.

    Args:
        places: the folders of the processes that wrote it.
        step: names the save.
        index: the number of the process that reads.

    Returns:
        `(arrays, own, state)`: the variables, put together from the pieces of all processes, where those that process
        `index` wrote come before others; arrays that are its own; and its state. Where no such process wrote, the
        last two are of process 0.

    Raises:
        ValueError: if pieces are missing.
    """
    index = index if index < len(places) else 0
    order = [index, *(i for i in range(len(places)) if i != index)]
    snapshots = [_snapshots.read(places[i], step) for i in order]
    own, state = snapshots[0]
    count = state["variables"]
    parts = zip(*(arrays[:count] for arrays, _ in snapshots), strict=True)
    arrays = [_snapshots.Saved(each[0].shape, [piece for x in each for piece in x.pieces]) for each in parts]
    missing = [place for place, x in enumerate(arrays) if not x.is_whole]
    if missing:
        raise ValueError(
            "The pieces of a variable must make up all of it. Received: step "
            f"{step} in {[str(place) for place in places]}, where variable {missing[0]} has not all. Remove this step "
            "there: the one before it, if there is one, is taken then."
        )
    return arrays, own[count:], state


def remove_old(folder, count, index, step, keep):
    """Removes all but the last `keep` saves up to a step that all processes have saved.

    Args:
        folder: of the training.
        count, index: how many processes train, and which of them this is: it removes what is its own. The first also
            removes what processes have left that are no more.
        step: just saved; what is later, of a run that was broken, stays.
        keep: a count.
    """
    places = folders(folder, count)
    written = {found for place in _all(folder) for found in _snapshots.steps(place) if found <= step}
    oldest = sorted(written)[-keep:][0]
    others = [place for place in _all(folder) if place not in places] if index == 0 else []
    for place in (places[index], *others):
        _snapshots.remove_before(place, oldest)


def _whole(folder):
    """`(step, processes)` of the saves that all of their processes have written."""
    written = {}
    for place in _all(folder):
        for step in _snapshots.steps(place):
            state = _snapshots.read_state(place, step)
            # Format 1 does not say of how many processes it is.
            processes = state.get("processes", 1 if place == Path(folder) else len(_all(folder)) - 1)
            written.setdefault((step, processes, state.get("run")), set()).add(place)
    return [(step, n) for (step, n, _), places in written.items() if places >= set(folders(folder, n))]


def _all(folder):
    """The folder itself, and those of processes."""
    return [Path(folder), *sorted(Path(folder).glob(f"{_PROCESS}*"))]

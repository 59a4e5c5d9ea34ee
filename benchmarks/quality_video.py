"""Clips, for `quality.py`: each task, and its controls."""

import statistics
import time

from video_classification import TASKS, accuracy, train

import keras_jamba

LENGTHS = {"match": (16, 32, 64)}
# Four minutes a training on two cores: where time is short the shipped weights are tested on new clips.
LONG = ("match",)


def run(store, seeds, salt, small):
    """Trains and tests each task with each seed, and its controls with the first."""
    for name, task in TASKS.items():
        shipped = small and name in LONG
        for seed in seeds:
            controls = tuple(task.ceilings) if seed == seeds[0] and not shipped else ()
            for control in (None, *controls):
                of = dict(part="video", task=name, control=control, seed=seed, salt=salt)
                if not store.has(of):
                    _run_one(store, of, task, shipped)


def _run_one(store, of, task, shipped):
    name, control, seed, salt = task.name, of["control"], of["seed"], of["salt"]
    started = time.perf_counter()
    model = keras_jamba.DHCJamba.from_preset(f"video_{name}") if shipped else train(name, seed, salt, control)
    seconds = None if shipped else round(time.perf_counter() - started, 1)
    lengths = LENGTHS.get(name, (task.frames,)) if control is None else (task.frames,)
    right = {f"T={T}": accuracy(model, name, seed, salt, control, T) for T in lengths}
    store.add(of, accuracy=right, parameters=model.count_params(), seconds=seconds)


def table(store):
    rows = []
    for name, task in TASKS.items():
        for control in (None, *task.ceilings):
            records = store.select(part="video", task=name, control=control)
            for length in records[0]["accuracy"] if records else ():
                values = [r["accuracy"][length] for r in records]
                seconds = [r["seconds"] for r in records if r["seconds"] is not None]
                rows.append(
                    {
                        "task": name,
                        "clips": f"{control} frames" if control else "as they are",
                        "frames": length,
                        "accuracy": f"{statistics.mean(values):.2f} (min {min(values):.2f})",
                        "ceiling": f"{task.ceilings[control]:.1f}" if control else "100",
                        "seeds": len(values),
                        "parameters": f"{records[0]['parameters']:,}",
                        "seconds of training": f"{statistics.mean(seconds):.0f}" if seconds else "shipped weights",
                    }
                )
    return rows

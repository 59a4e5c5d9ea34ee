"""Clips, for `quality.py`: each task, and its controls."""

import statistics
import time

from video_classification import TASKS, TEST_CLIPS, accuracy, train

import keras_jamba

LENGTHS = {"match": (16, 32, 64)}
# Four minutes a training on two cores: where time is short the shipped weights are tested on new clips.
LONG = ("match",)
# How many more clips a control learns from than the task, until it finds what is left to be found.
MORE = {("direction", "shuffled"): 4.0}

# Percent that a model must reach, by task and frames.
LEAST = {"direction": {8: 99.5}, "order": {12: 99.0}, "match": {16: 97.0, 64: 95.0}}


def run(store, seeds, salt, small):
    """Trains and tests each task with each seed; with the first its controls, and every cell of every frame.

    Where time is short the latter is left out, and controls that can only guess learn from a quarter of the clips.
    """
    for name, task in TASKS.items():
        shipped = small and name in LONG
        for seed in seeds:
            variants = [(None, "frames")]
            if seed == seeds[0]:
                variants += [(control, "frames") for control in task.ceilings]
                variants += [(None, "grid+frames")] if name == "direction" and not small else []
            for control, tokens in variants:
                of = dict(part="video", task=name, control=control, tokens=tokens, seed=seed, salt=salt)
                share = MORE.get((name, control), 0.25 if small and control and name == "order" else 1.0)
                if not store.has(of):
                    _run_one(store, of, task, shipped, share)


def _run_one(store, of, task, shipped, share):
    name, control, seed, salt = task.name, of["control"], of["seed"], of["salt"]
    started = time.perf_counter()
    if shipped:
        model, seconds = keras_jamba.DHCJamba.from_preset(f"video_{name}"), None
    else:
        model = train(name, seed, salt, control, share, tokens=of["tokens"])
        seconds = round(time.perf_counter() - started, 1)
    lengths = LENGTHS.get(name, (task.frames,)) if control is None else (task.frames,)
    right = {f"T={T}": accuracy(model, name, seed, salt, control, T) for T in lengths}
    store.add(of, accuracy=right, parameters=model.count_params(), seconds=seconds)


def failures(store):
    """What is wrong: a control above its ceiling by more than chance, which is a leak, or a model that fails."""
    wrong = []
    for record in store.select(part="video"):
        of = record["of"]
        for length, right in record["accuracy"].items():
            what = f"{of['task']}, {of['tokens']}, seed {of['seed']}, {length}: {right:.2f} %"
            if of["control"]:
                share = TASKS[of["task"]].ceilings[of["control"]] / 100
                most = 100 * (share + 3 * (share * (1 - share) / TEST_CLIPS) ** 0.5)
                wrong += [f"{what} of {of['control']} frames, at most {most:.2f}"] if right > most else []
            else:
                least = LEAST[of["task"]].get(int(length[2:]), 0)
                wrong += [f"{what}, at least {least}"] if right < least else []
    return wrong


def table(store):
    rows = []
    for name, task in TASKS.items():
        variants = [(None, "frames"), (None, "grid+frames"), *((control, "frames") for control in task.ceilings)]
        for control, tokens in variants:
            records = store.select(part="video", task=name, control=control, tokens=tokens)
            for length in records[0]["accuracy"] if records else ():
                values = [r["accuracy"][length] for r in records]
                seconds = [r["seconds"] for r in records if r["seconds"] is not None]
                rows.append(
                    {
                        "task": name,
                        "clips": f"{control} frames" if control else "as they are",
                        "tokens": tokens,
                        "frames": length,
                        "accuracy": f"{statistics.mean(values):.2f} (min {min(values):.2f})",
                        "ceiling": f"{task.ceilings[control]:.1f}" if control else "100",
                        "seeds": len(values),
                        "parameters": f"{records[0]['parameters']:,}",
                        "seconds of training": f"{statistics.mean(seconds):.0f}" if seconds else "shipped weights",
                    }
                )
    return rows

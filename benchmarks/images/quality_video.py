"""Clips for `benchmarks.images.quality`: each task, and its controls."""

import statistics
import time

from video_classification import TASKS, TEST_CLIPS, accuracy, train

import keras_jamba

LENGTHS = {"match": (16, 32, 64)}
# A training takes four minutes on two cores. The cpu tier therefore tests the shipped weights on new clips.
SLOW_TASKS = ("match",)
# Ratio of training clips of a control to those of the task, so that the control reaches its ceiling.
CLIP_FACTORS = {("direction", "shuffled"): 4.0}

# Minimum accuracy of a model in percent, by task and number of frames.
MINIMUM_ACCURACY = {"direction": {8: 99.5}, "order": {12: 99.0}, "match": {16: 97.0, 64: 95.0}}


def run(store, seeds, salt, small):
    """Trains and tests each task with each seed.

    The first seed also trains the controls, and "direction" with the tokens "grid+frames". With `small`, the latter is
    left out, and controls that can only guess train on a quarter of the clips.
    """
    for name, task in TASKS.items():
        use_shipped_weights = small and name in SLOW_TASKS
        for seed in seeds:
            variants = [(None, "frames")]
            if seed == seeds[0]:
                variants += [(control, "frames") for control in task.ceilings]
                variants += [(None, "grid+frames")] if name == "direction" and not small else []
            for control, tokens in variants:
                key = dict(part="video", task=name, control=control, tokens=tokens, seed=seed, salt=salt)
                factor = CLIP_FACTORS.get((name, control), 0.25 if small and control and name == "order" else 1.0)
                if not store.has(key):
                    _run_one(store, key, task, use_shipped_weights, factor)


def _run_one(store, key, task, use_shipped_weights, factor):
    name, control, seed, salt = task.name, key["control"], key["seed"], key["salt"]
    started = time.perf_counter()
    if use_shipped_weights:
        model, seconds = keras_jamba.DHCJamba.from_preset(f"video_{name}"), None
    else:
        model = train(name, seed, salt, control, factor, tokens=key["tokens"])
        seconds = round(time.perf_counter() - started, 1)
    lengths = LENGTHS.get(name, (task.frames,)) if control is None else (task.frames,)
    accuracies = {f"T={T}": accuracy(model, name, seed, salt, control, T) for T in lengths}
    store.add(key, accuracy=accuracies, parameters=model.count_params(), seconds=seconds)


def failures(store):
    """Returns messages on controls above their ceiling by more than chance (leaks), and models below their minimum."""
    messages = []
    for record in store.select(part="video"):
        key = record["of"]
        for length, percent in record["accuracy"].items():
            description = f"{key['task']}, {key['tokens']}, seed {key['seed']}, {length}: {percent:.2f} %"
            if key["control"]:
                ceiling = TASKS[key["task"]].ceilings[key["control"]] / 100
                maximum = 100 * (ceiling + 3 * (ceiling * (1 - ceiling) / TEST_CLIPS) ** 0.5)
                if percent > maximum:
                    messages.append(f"{description} of {key['control']} frames, at most {maximum:.2f}")
            else:
                minimum = MINIMUM_ACCURACY[key["task"]].get(int(length[2:]), 0)
                if percent < minimum:
                    messages.append(f"{description}, at least {minimum}")
    return messages


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

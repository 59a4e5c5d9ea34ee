"""Clips, for `quality.py`: each task, and its controls."""

import statistics
import time

from video_classification import TASKS, accuracy, train

LENGTHS = {"match": (16, 32, 64)}
# One of a pair is the other backwards; 2,000 clips at 50 % deviate by 1.1 points.
ALLOWED = 3.4


def run(store, seeds, salt, small):
    """Trains and tests each task; its controls with the first seed only where time is short."""
    for name, task in TASKS.items():
        for seed in seeds:
            controls = tuple(task.ceilings) if seed == seeds[0] or not small else ()
            for control in (None, *controls):
                of = dict(part="video", task=name, control=control, seed=seed, salt=salt)
                if store.has(of):
                    continue
                started = time.perf_counter()
                model = train(name, seed, salt, control)
                seconds = round(time.perf_counter() - started, 1)
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
                rows.append(
                    {
                        "task": name,
                        "clips": control or "as they are",
                        "frames": length,
                        "accuracy": f"{statistics.mean(values):.2f} (min {min(values):.2f})",
                        "ceiling": f"{task.ceilings[control]:.1f}" if control else "100",
                        "seeds": len(values),
                        "parameters": f"{records[0]['parameters']:,}",
                        "seconds": f"{statistics.mean(r['seconds'] for r in records):.0f}",
                    }
                )
    return rows

"""Rows of the tables of `results/photos.json`, the records of trainings by `benchmarks.images.photos`."""

import json
import statistics

from benchmarks.images.photo_trainings import training_of


def title(record):
    """Returns the name of the model, with the settings that differ from its usual ones. The epochs have a column."""
    given, usual = record["arguments"], training_of(record["arguments"]["model"])
    changed = {name: value for name, value in record["recipe"].items() if name != "epochs" and value != usual[name]}
    changes = [f"{name.replace('_', ' ')} {value}" for name, value in changed.items()]
    changes += [f"{name} {value}" for name, value in given.get("options", {}).items()]
    return ", ".join([given["model"], *changes])


def grouped(records, split, name):
    """Returns `{title: records}` of the trainings that were measured on a split of a data set.

    Trainings of other lengths are other groups, with their epochs in the title.
    """
    chosen = [record for record in records if split in record and record["arguments"]["set"] == name]
    groups, epochs = {}, {}
    for record in chosen:
        length = record["recipe"]["epochs"]
        named = title(record)
        if epochs.setdefault(named, length) != length:
            named = f"{named}, {length} epochs"
        groups.setdefault(named, []).append(record)
    return groups


def accuracies(groups, split):
    """Returns one row of a table per group: means over the seeds, the most accurate model first."""
    rows = []
    for name, records in groups.items():
        found = [record[split]["accuracy"] for record in records]
        rows.append(
            {
                "model": name,
                "parameters": f"{records[0]['parameters']:,}",
                "epochs": records[0]["recipe"]["epochs"],
                "seeds": len(found),
                "accuracy, %": f"{statistics.mean(found):.2f}",
                "lowest": f"{min(found):.2f}",
                "calibration error, %": f"{statistics.mean(r[split]['calibration error'] for r in records):.2f}",
                "seconds": f"{statistics.mean(r['seconds'] for r in records):.0f}",
                "images per second": _mean_rate(records),
            }
        )
    return sorted(rows, key=lambda row: -float(row["accuracy, %"]))


def _mean_rate(records):
    # A training of one epoch has no rate: the first epoch includes the compilation.
    rates = [record["images per second"] for record in records if record["images per second"] is not None]
    return f"{statistics.mean(rates):,.0f}" if rates else None


def corruptions(groups):
    """Returns one row per corruption, with the mean accuracy of each group in percent."""
    names = list(next(iter(groups.values()))[0]["corrupted"])
    mean = lambda records, name: statistics.mean(r["corrupted"][name] for r in records)  # noqa: E731
    clean = {m: f"{statistics.mean(r['test']['accuracy'] for r in records):.1f}" for m, records in groups.items()}
    rows = [{"images": n} | {m: f"{mean(records, n):.1f}" for m, records in groups.items()} for n in names]
    return [{"images": "clean"} | clean, *rows]


def read(folder):
    """Returns the records of all trainings in a folder, sorted by model and seed.

    Args:
        folder: a Path. Each training has a folder in it, with a `result.json`.
    """
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/result.json"))]
    if not records:
        raise FileNotFoundError(f"The folder must hold NAME/result.json. Received: {str(folder)!r}, which has none.")
    for record in records:
        given = record["arguments"]
        # Paths of one machine, and settings without effect on the numbers.
        dropped = {"output", "preset", "workers"} | ({"options"} if not given.get("options") else set())
        record["arguments"] = {name: value for name, value in given.items() if name not in dropped}
    return sorted(records, key=lambda record: (record["arguments"]["model"], record["arguments"]["seed"]))

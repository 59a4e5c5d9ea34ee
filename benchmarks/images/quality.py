"""Accuracy of DHCJamba on digits and clips, with other classifiers as peers, and an ablation of its options.

    KERAS_BACKEND=jax python -m benchmarks.images.quality --tier cpu     3 seeds, less than 20 minutes on 2 cores
    KERAS_BACKEND=jax python -m benchmarks.images.quality --tier full    10 seeds (clips: 3), ablation, hours on a CPU

Each finished training is stored in --store, so that the same command resumes an interrupted run. On a GPU all seeds of
a model train in one program. Recipe and options were chosen on parts of the training half of D2 and of the training
part of D1's first split. These share images with the test sets of D1's other splits. Test sets are used once per seed.

Prints tables and writes results/quality_*.json. Exits with status 1 if a control of the clips exceeds its ceiling, or
if a model is below its minimum.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import keras

from benchmarks import measure
from keras_jamba import _backend

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from benchmarks.images import quality_digits as digits  # noqa: E402
from benchmarks.images import quality_video as video  # noqa: E402
from benchmarks.images.digits_models import ABLATION, BASES, NETWORKS  # noqa: E402

AUGMENTED, PLAIN = ("D1", "D2"), "D2 without augmentation"
# Tier cpu: rows that are also trained without augmentation, and rows that are left out.
CPU_ROWS_WITHOUT_AUGMENTATION, ROWS_ONLY_IN_FULL = ("DHCJamba",), ("DHCJamba, bidirectional",)


class Store:
    """Finished trainings, one line of JSON each, by the settings of the training."""

    def __init__(self, file):
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        self.records = {json.dumps(r["of"]): r for r in map(json.loads, lines)}

    def has(self, key):
        return json.dumps(key) in self.records

    def add(self, key, **figures):
        record = {"of": key, **figures, "on": f"{keras.backend.backend()}, {_backend.device.device_name()}"}
        self.records[json.dumps(key)] = record
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        print(json.dumps(record)[:160], file=sys.stderr, flush=True)

    def select(self, **key):
        return [r for r in self.records.values() if key.items() <= r["of"].items()]


def run_digits(store, seeds, salt, epochs, small):
    for seed in seeds:
        for protocol in AUGMENTED:
            for row, make in digits.CLASSICAL.items():
                key = dict(part="digits", row=row, protocol=protocol, seed=seed, salt=salt)
                if store.has(key):
                    continue
                x, y, x_test, y_test = digits.split(protocol, seed, salt)
                started = time.perf_counter()
                model = make().fit(x.reshape(len(x), -1), y)
                seconds = round(time.perf_counter() - started, 3)
                accuracy = 100 * model.score(x_test.reshape(len(x_test), -1), y_test)
                store.add(key, accuracy=accuracy, parameters=None, seconds=seconds)
    for row, make in NETWORKS.items():
        for protocol in (*AUGMENTED, PLAIN):
            if small and row in ROWS_ONLY_IN_FULL:
                continue
            if not small or protocol != PLAIN or row in CPU_ROWS_WITHOUT_AUGMENTATION:
                _run_network(store, "digits", row, make, [(protocol, seed) for seed in seeds], salt, epochs)


def run_ablation(store, seeds, salt, epochs):
    splits = [(f"fold {fold}", seed) for fold in range(digits.FOLDS) for seed in seeds]
    for row, make in ABLATION.items():
        _run_network(store, "ablation", row, make, splits, salt, epochs)


def _run_network(store, part, row, make, splits, salt, epochs):
    """Trains the missing ones of `splits`, pairs of a protocol and a seed."""
    keys = [dict(part=part, row=row, protocol=protocol, seed=seed, salt=salt) for protocol, seed in splits]
    missing = [key for key in keys if not store.has(key | {"epochs": epochs})]
    if not missing:
        return
    data = [digits.split(key["protocol"], key["seed"], salt) for key in missing]
    recipe = digits.recipe_of(missing[0]["protocol"], epochs)
    # Another salt also changes weights and augmentations.
    seeds = [key["seed"] + 1000 * salt for key in missing]
    for index, model, seconds in digits.trained(make, recipe, [pair[:2] for pair in data], seeds):
        key, (_, _, x_test, y_test) = missing[index], data[index]
        accuracy, loss = digits.accuracy(model, x_test, y_test)
        figures = dict(accuracy=accuracy, loss=loss, parameters=model.count_params(), seconds=round(seconds, 1))
        if key["protocol"] == "D2":
            corrupted = digits.corruptions(x_test, key["seed"] + 1000 * salt)
            figures["corrupted"] = {name: digits.accuracy(model, x, y_test)[0] for name, x in corrupted.items()}
        store.add(key | {"epochs": epochs}, **figures)


def digits_table(store):
    svc = {protocol: _best_svc(store, protocol) for protocol in AUGMENTED}
    rows = []
    for row in (*digits.CLASSICAL, *NETWORKS):
        records = store.select(part="digits", row=row)
        if not records:
            continue
        parameters = records[0]["parameters"]
        line = {"model": row, "parameters": f"{parameters:,}" if parameters else "–"}
        for protocol in (*AUGMENTED, PLAIN):
            found = [r for r in records if r["of"]["protocol"] == protocol]
            line[protocol] = _spread([r["accuracy"] for r in found])
            if protocol != PLAIN:
                differences = [r["accuracy"] - svc[protocol][r["of"]["seed"]] for r in found]
                line[f"{protocol}, above the best SVC"] = f"{statistics.mean(differences):+.2f}" if differences else "–"
        line["seconds a fit (D2)"] = _mean([r["seconds"] for r in records if r["of"]["protocol"] == "D2"], "{:.1f}")
        rows.append(line)
    return rows


def _best_svc(store, protocol):
    """Returns `{seed: accuracy}` of the SVC with the best mean."""
    found = [
        {r["of"]["seed"]: r["accuracy"] for r in store.select(part="digits", row=row, protocol=protocol)}
        for row in digits.CLASSICAL
        if row.startswith("SVC")
    ]
    return max(found, key=lambda accuracies: statistics.mean(accuracies.values() or [0]))


def corruption_table(store):
    rows = []
    for row in NETWORKS:
        records = store.select(part="digits", row=row, protocol="D2")
        if records:
            names = records[0]["corrupted"]
            clean = {"clean": _mean([r["accuracy"] for r in records])}
            rows.append({"model": row} | clean | {n: _mean([r["corrupted"][n] for r in records]) for n in names})
    return rows


def ablation_table(store):
    rows = []
    for row in ABLATION:
        base_row = BASES.get(row, next(iter(ABLATION)))
        base = {_split(r): r for r in store.select(part="ablation", row=base_row)}
        records = [r for r in store.select(part="ablation", row=row) if _split(r) in base]
        if not records:
            continue
        gains = [r["accuracy"] - base[_split(r)]["accuracy"] for r in records]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        rows.append(
            {
                "option": row,
                "over": base_row.split(":")[0],
                "parameters": f"{records[0]['parameters']:,}",
                "accuracy": _mean([r["accuracy"] for r in records]),
                "gain ± standard error": f"{statistics.mean(gains):+.2f} ± {error:.2f}",
                "loss x 1000": _mean([1000 * r["loss"] for r in records], "{:.0f}"),
            }
        )
    return rows


def _split(record):
    return record["of"]["protocol"], record["of"]["seed"]


def _mean(values, form="{:.2f}"):
    return form.format(statistics.mean(values)) if values else "–"


def _spread(values):
    if not values:
        return "–"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f} (min {min(values):.2f})"


def report(store, name, settings):
    """Prints the tables of all stored trainings, and writes them with the devices that trained."""
    tables = {
        "digits": digits_table(store),
        "corrupted digits (D2)": corruption_table(store),
        "video": video.table(store),
        "ablation": ablation_table(store),
    }
    for title, rows in tables.items():
        if rows:
            print(f"\n{title}\n\n{measure.table(rows, list(rows[0]))}")
    trainings = [{**r.pop("of"), **r} for r in map(dict, store.records.values())]
    origin = {
        "trained on": sorted({r["on"] for r in trainings}),
        "seconds of training": round(sum(r["seconds"] or 0 for r in trainings)),
    }
    found = {title: rows for title, rows in tables.items() if rows}
    measure.record(name, {**settings, **origin, **found, "trainings": trainings})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=("cpu", "full"), default="cpu")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=None,
        help="default: 0 1 2, or 0 to 9 in the full tier; "
        "clips use the first three of them, the ablation the first four",
    )
    parser.add_argument("--salt", type=int, default=0, help="changes splits, clips and weights")
    parser.add_argument("--parts", nargs="+", choices=("digits", "video", "ablation"), default=None)
    parser.add_argument("--store", type=Path, default=Path("runs/quality"))
    parser.add_argument("--report", action="store_true", help="only print and write the stored trainings")
    args = parser.parse_args()
    small = args.tier == "cpu"
    seeds = args.seeds or list(range(3 if small else 10))
    parts = args.parts or (("digits", "video") if small else ("digits", "video", "ablation"))
    epochs = 30 if small else 60
    store, started = Store(args.store / f"{args.tier}_{args.salt}.jsonl"), time.perf_counter()
    if not args.report:
        if "digits" in parts:
            run_digits(store, seeds, args.salt, epochs, small)
        if "video" in parts:
            video.run(store, seeds[:3], args.salt, small)
        if "ablation" in parts:
            run_ablation(store, seeds[:4], args.salt, epochs)
    seconds = round(time.perf_counter() - started)
    print(f"{seconds} s")
    report(store, f"quality_{args.tier}", {"epochs of digits": epochs, "salt": args.salt, "seconds": seconds})
    if failures := video.failures(store):
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()

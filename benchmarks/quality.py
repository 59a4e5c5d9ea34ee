"""How well DHCJamba classifies digits and clips, beside what else classifies them; and what each option adds.

    KERAS_BACKEND=jax python benchmarks/quality.py --tier cpu     3 seeds, less than 20 minutes on 2 cores
    KERAS_BACKEND=jax python benchmarks/quality.py --tier full    10 seeds (clips: 3), ablation, hours on a CPU

Every training is kept in --store when it ends: started again, the same command goes on where it was. On a GPU all
seeds of a model train in one program. Recipe and options were chosen on parts of the training half of D2 and of the
training part of D1's first split, which share images with the tests of D1's other splits; the tests are looked at
once a seed. Prints tables and writes results/quality_*.json; ends with status 1 where a control of the clips scores
more than it can, or a model too little.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import keras
import measure

from keras_jamba import _backend

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import quality_digits as digits  # noqa: E402
import quality_video as video  # noqa: E402
from digits_models import ABLATION, BASES, NETWORKS  # noqa: E402

AUGMENTED, PLAIN = ("D1", "D2"), "D2 without augmentation"
# Rows of the cpu tier that are trained without augmentation too, and that are left out there.
CPU_ROWS_WITHOUT, CPU_ROWS_NOT = ("DHCJamba",), ("DHCJamba, bidirectional",)


class Store:
    """Finished trainings: a line of JSON each, found by what was trained."""

    def __init__(self, file):
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        self.records = {json.dumps(r["of"]): r for r in map(json.loads, lines)}

    def has(self, of):
        return json.dumps(of) in self.records

    def add(self, of, **figures):
        record = {"of": of, **figures, "on": f"{keras.backend.backend()}, {_backend.device.device_name()}"}
        self.records[json.dumps(of)] = record
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        print(json.dumps(record)[:160], file=sys.stderr, flush=True)

    def select(self, **of):
        return [r for r in self.records.values() if of.items() <= r["of"].items()]


def run_digits(store, seeds, salt, epochs, small):
    for seed in seeds:
        for protocol in AUGMENTED:
            for row, make in digits.CLASSICAL.items():
                of = dict(part="digits", row=row, protocol=protocol, seed=seed, salt=salt)
                if store.has(of):
                    continue
                x, y, x_test, y_test = digits.split(protocol, seed, salt)
                started = time.perf_counter()
                model = make().fit(x.reshape(len(x), -1), y)
                seconds = round(time.perf_counter() - started, 3)
                right = 100 * model.score(x_test.reshape(len(x_test), -1), y_test)
                store.add(of, accuracy=right, parameters=None, seconds=seconds)
    for row, make in NETWORKS.items():
        for protocol in (*AUGMENTED, PLAIN):
            if small and row in CPU_ROWS_NOT:
                continue
            if not small or protocol != PLAIN or row in CPU_ROWS_WITHOUT:
                _run_network(store, "digits", row, make, [(protocol, seed) for seed in seeds], salt, epochs)


def run_ablation(store, seeds, salt, epochs):
    places = [(f"fold {fold}", seed) for fold in range(digits.FOLDS) for seed in seeds]
    for row, make in ABLATION.items():
        _run_network(store, "ablation", row, make, places, salt, epochs)


def _run_network(store, part, row, make, places, salt, epochs):
    """Trains what is missing of `places`, pairs of a protocol and a seed."""
    ofs = [dict(part=part, row=row, protocol=protocol, seed=seed, salt=salt) for protocol, seed in places]
    missing = [of for of in ofs if not store.has(of | {"epochs": epochs})]
    if not missing:
        return
    data = [digits.split(of["protocol"], of["seed"], salt) for of in missing]
    recipe = digits.recipe_of(missing[0]["protocol"], epochs)
    # Another salt draws other weights and augmentations too.
    seeds = [of["seed"] + 1000 * salt for of in missing]
    for place, model, seconds in digits.trained(make, recipe, [pair[:2] for pair in data], seeds):
        of, (_, _, x_test, y_test) = missing[place], data[place]
        right, loss = digits.accuracy(model, x_test, y_test)
        figures = dict(accuracy=right, loss=loss, parameters=model.count_params(), seconds=round(seconds, 1))
        if of["protocol"] == "D2":
            changed = digits.corruptions(x_test, of["seed"] + 1000 * salt)
            figures["corrupted"] = {name: digits.accuracy(model, x, y_test)[0] for name, x in changed.items()}
        store.add(of | {"epochs": epochs}, **figures)


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
                above = [r["accuracy"] - svc[protocol][r["of"]["seed"]] for r in found]
                line[f"{protocol}, above the best SVC"] = f"{statistics.mean(above):+.2f}" if above else "–"
        line["seconds a fit (D2)"] = _mean([r["seconds"] for r in records if r["of"]["protocol"] == "D2"], "{:.1f}")
        rows.append(line)
    return rows


def _best_svc(store, protocol):
    """`{seed: accuracy}` of the one that is best on average."""
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
        over = BASES.get(row, next(iter(ABLATION)))
        base = {_place(r): r for r in store.select(part="ablation", row=over)}
        records = [r for r in store.select(part="ablation", row=row) if _place(r) in base]
        if not records:
            continue
        gains = [r["accuracy"] - base[_place(r)]["accuracy"] for r in records]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        rows.append(
            {
                "option": row,
                "over": over.split(":")[0],
                "parameters": f"{records[0]['parameters']:,}",
                "accuracy": _mean([r["accuracy"] for r in records]),
                "gain ± standard error": f"{statistics.mean(gains):+.2f} ± {error:.2f}",
                "loss x 1000": _mean([1000 * r["loss"] for r in records], "{:.0f}"),
            }
        )
    return rows


def _place(record):
    return record["of"]["protocol"], record["of"]["seed"]


def _mean(values, form="{:.2f}"):
    return form.format(statistics.mean(values)) if values else "–"


def _spread(values):
    if not values:
        return "–"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f} (min {min(values):.2f})"


def report(store, name, settings):
    """Prints the tables of what is in the store, and writes them beside the machine they come from."""
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
    where = {
        "trained on": sorted({r["on"] for r in trainings}),
        "seconds of training": round(sum(r["seconds"] or 0 for r in trainings)),
    }
    found = {title: rows for title, rows in tables.items() if rows}
    measure.record(name, {**settings, **where, **found, "trainings": trainings})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=("cpu", "full"), default="cpu")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=None,
        help="default: 0 1 2, or 0 to 9 in the full tier; "
        "of them clips take the first three, the ablation the first four",
    )
    parser.add_argument("--salt", type=int, default=0, help="draws other splits, clips and weights")
    parser.add_argument("--parts", nargs="+", choices=("digits", "video", "ablation"), default=None)
    parser.add_argument("--store", type=Path, default=Path("runs/quality"))
    parser.add_argument("--report", action="store_true", help="only print and write what is in the store")
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

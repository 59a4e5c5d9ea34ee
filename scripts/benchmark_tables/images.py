"""The tables of docs/benchmarks/images.md."""

import re

from scripts.benchmark_tables.tables import BACKENDS, TITLES, markdown, read, runs, table

# Names of models in the results file that differ from those in the table.
MODELS = {
    "encoder only": "the encoder alone",
    "gated convolution": '`mixer="gated_conv"`',
    "DHCJamba": "`DHCJamba`",
    "DHCJamba, bidirectional": '`direction="bidirectional"`',
}


def spread(text):
    """Returns `mean ± deviation (minimum)`, or the mean alone of a model without random numbers."""
    return re.sub(r" ± 0\.00 \(min .*\)", "", text).replace("(min ", "(")


@table
def digits():
    """Accuracy on digits in percent."""
    protocols = ("D1", "D2", "D2 without augmentation")
    rows = [
        [MODELS.get(row["model"], row["model"]), row["parameters"], *(spread(row[name]) for name in protocols)]
        for row in read("quality_full")["digits"]
    ]
    return markdown(["model", "parameters", "shuffled", "writers", "writers, no augmentation"], rows)


@table
def corrupted_digits():
    """Accuracy on corrupted digits in percent."""
    found = read("quality_full")["corrupted digits (D2)"]
    names = [name for name in found[0] if name != "model"]
    rows = [[name, *(row[name] for row in found)] for name in names]
    return markdown(["images", *(MODELS.get(row["model"], row["model"]) for row in found)], rows)


@table
def ablation():
    """Gain of each option of image models in points."""
    rows = []
    for row in read("quality_full")["ablation"]:
        gain = None if row["option"].startswith("base") else row["gain ± standard error"]
        rows.append([row["option"], row["over"], row["parameters"], row["accuracy"], gain])
    titles = ["option", "compared with", "parameters", "accuracy, %", "gain ± standard error, points"]
    return markdown(titles, rows)


@table
def video():
    """Accuracy on clips in percent, with controls."""
    rows = []
    for row in read("quality_full")["video"]:
        frames, accuracy = row["frames"].removeprefix("T="), row["accuracy"].replace("(min ", "(")
        rows.append([row["task"], row["clips"], f'`"{row["tokens"]}"`', frames, accuracy, row["ceiling"], row["seeds"]])
    titles = ["task", "clips", "tokens", "frames", "accuracy, %", "highest possible, %", "trainings"]
    return markdown(titles, rows)


@table
def image_speed():
    """Images per second and accuracy on digits, with a ViT and a ResNet of equal size."""
    rows = []
    for backend in BACKENDS:
        for name, row in read(f"image_speed_{backend}")["models"].items():
            speeds = [f"{row['images per second'][kind]:,.0f}" for kind in ("fit", "predict")]
            accuracy = f"{sum(row['accuracy']) / len(row['accuracy']):.2f}"
            rows.append([TITLES[backend], MODELS.get(name, name), f"{row['parameters']:,}", *speeds, accuracy])
    return markdown(["backend", "model", "parameters", "`fit`", "`predict`", "accuracy, %"], rows)


@table
def images_runs():
    return runs("quality_full", *(f"image_speed_{backend}" for backend in BACKENDS))

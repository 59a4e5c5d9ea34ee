"""The tables of docs/benchmarks/images.md."""

import re
import statistics

from benchmarks.images import photo_tables
from scripts.benchmark_tables.tables import BACKENDS, TITLES, markdown, read, runs, runs_of, table

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


def photo_groups(split, name):
    """Returns `{title: records}` of the trainings on CIFAR-10 or Fashion-MNIST that were measured on a split."""
    return photo_tables.grouped(read("photos")["trainings"], split, name)


def photo_accuracies(split, name):
    rows = photo_tables.accuracies(photo_groups(split, name), split)
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


@table
def photos():
    """Accuracy on the test images of CIFAR-10 (JPEG 75)."""
    return photo_accuracies("test", "cifar10")


@table
def fashion():
    """Accuracy on the test images of Fashion-MNIST."""
    return photo_accuracies("test", "fashion")


@table
def photo_choices():
    """Accuracy on validation images, by which models and recipe were chosen."""
    rows = []
    for name, title in (("cifar10", "photographs"), ("fashion", "clothes")):
        for row in photo_tables.accuracies(photo_groups("validation", name), "validation"):
            rows.append([title, row["model"], row["parameters"], row["epochs"], row["accuracy, %"]])
    return markdown(["images", "model", "parameters", "epochs", "accuracy, %"], rows)


@table
def corrupted_photos():
    """Accuracy on corrupted test images of CIFAR-10 (JPEG 75)."""
    rows = photo_tables.corruptions(photo_groups("test", "cifar10"))
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


@table
def transfer():
    """Accuracy after fine-tuning the preset, and after training from scratch."""
    rows = []
    for row in read("transfer_jax")["rows"]:
        found = [row[start]["accuracy"] for start in ("preset", "scratch")]
        means = [statistics.mean(values) for values in found]
        shown = [f"{mean:.1f} ± {statistics.pstdev(values):.1f}" for mean, values in zip(means, found, strict=True)]
        rows.append([row["task"], row["images per class"], *shown, f"{means[0] - means[1]:+.1f}"])
    return markdown(["images", "per class", "preset, %", "from scratch, %", "gain, points"], rows)


@table
def gpu_images():
    """Speed of training on a GPU, beside a ViT."""
    rows = []
    for backend in ("jax", "torch"):
        for name, row in read(f"gpu_images_{backend}")["models"].items():
            rates = [f"{row[f'{kind}, images per second']:,}" for kind in ("fit", "augmented")]
            times = [f"{row[kind]:.1f}" for kind in ("step of fit, ms", "device, ms per step", "train_on_batch, ms")]
            rows.append([TITLES[backend], name, f"{row['parameters']:,}", *rates, *times])
    titles = ["backend", "model", "parameters", "images/s", "images/s, augmented"]
    return markdown([*titles, "ms per step", "ms on the device", "ms per `train_on_batch`"], rows)


@table
def images_runs():
    return runs("quality_full", *(f"image_speed_{backend}" for backend in BACKENDS))


@table
def photo_runs():
    files = [f"gpu_images_{backend}" for backend in ("jax", "torch")]
    documents = [read("photos")["trainings"][0], *(read(name) for name in ("transfer_jax", *files))]
    return runs_of(dict(zip(("photos", "transfer_jax", *files), documents, strict=True)))

"""Tables and pictures of trainings by `benchmarks.images.photos`.

    KERAS_BACKEND=jax python -m benchmarks.images.photo_report RUNS --data DATA [--preset small]

RUNS holds one folder per training, each with a `result.json`. Prints the tables of accuracy, of the ablation and of
corrupted images. Writes results/photos.json, and three pictures: photo_curves.png, photo_confusion.png and
photo_saliency.png. The last two are of the test images and the preset.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.images import data_sets
from benchmarks.images.photo_tables import accuracies, corruptions, grouped, read

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

matplotlib.use("Agg")
# Shown in the picture of the learning curves.
CURVES = ("small", "medium", "large", "CCT", "ResNet-56", "encoder alone", "gated convolution")


def show(title, rows):
    if rows:
        print(f"\n{title}\n\n{measure.table(rows, list(rows[0]))}")


def draw_curves(groups, file):
    """Draws loss and accuracy on augmented training images per epoch, for the first seed of each model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in (name for name in CURVES if name in groups):
        history = groups[name][0]["history"]
        for axis, value in zip(axes, (history["loss"], 100 * np.array(history["accuracy"])), strict=True):
            axis.plot(np.arange(1, len(value) + 1), value, label=name)
    for axis, title in zip(axes, ("training loss", "accuracy on augmented training images, %"), strict=True):
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_preset(preset, data):
    """Draws the confusion matrix with sample mistakes, and the saliency of eight test images of different classes."""
    from pictures import draw_confusion_matrix

    model = keras_jamba.DHCJamba.from_preset(preset, pixel_range=(0, 255))
    images, labels = data.test
    predicted = model.predict(images, batch_size=250, verbose=0).argmax(-1)
    print(f"{preset}: {100 * (predicted == labels).mean():.2f} % of the test images, on this machine")
    shown = SimpleNamespace(classes=data.class_names, test_images=images, test_labels=labels)
    draw_confusion_matrix(shown, predicted, measure.RESULTS / "photo_confusion.png")
    draw_saliency(model, images[[np.flatnonzero(labels == label)[0] for label in range(8)]])


def draw_saliency(model, images):
    """Draws images above the share of the gradient of each pixel, with the predicted class."""
    import matplotlib.pyplot as plt

    maps = keras_jamba.visualize.saliency(model, images, samples=25)
    best = [top[0] for top in model.decode_predictions(model.predict(images, verbose=0), top=1)]
    figure, axes = plt.subplots(2, len(images), figsize=(1.6 * len(images), 3.7), layout="constrained")
    for (above, below), image, found, (name, probability) in zip(axes.T, images, maps, best, strict=True):
        above.imshow(image)
        above.set_title(f"{name}, {100 * probability:.0f} %", fontsize=9)
        below.imshow(found, cmap="inferno")
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(measure.RESULTS / "photo_saliency.png", dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of the trainings")
    parser.add_argument("--data", help=f"folder of the data sets; default: {data_sets.VARIABLE}")
    parser.add_argument("--preset", default="small", help="a name or a folder, for the pictures of test images")
    args = parser.parse_args()
    records = read(args.runs)
    tested, fashion = (grouped(records, "test", name) for name in ("cifar10", "fashion"))
    show("CIFAR-10 (JPEG 75), test images", accuracies(tested, "test"))
    show("Fashion-MNIST, test images", accuracies(fashion, "test"))
    for name in ("cifar10", "fashion"):
        show(f"{name}, validation images", accuracies(grouped(records, "validation", name), "validation"))
    for groups in (tested, fashion):
        show("Accuracy on corrupted test images, %", corruptions(groups) if groups else [])
    measure.record("photos", {"trainings": records})
    if tested:
        draw_curves(tested, measure.RESULTS / "photo_curves.png")
        draw_preset(args.preset, data_sets.load("cifar10", args.data))


if __name__ == "__main__":
    main()

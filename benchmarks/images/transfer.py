"""Fine-tuning of a preset on few images of other tasks, against training from scratch with as many steps.

    KERAS_BACKEND=jax python -m benchmarks.images.transfer [--preset small]

Tasks: scikit-learn's digits, enlarged to 32 x 32 RGB, with 5, 10 and 50 images per class of the first half, tested on
the second half, which other people wrote; and Fashion-MNIST, padded to 32 x 32 RGB, with 10, 50 and 250 per class.
The learning rate of each row is chosen among three on other images of the training half. Five seeds draw the images
and, from scratch, the weights. Prints a table, and writes results/transfer_BACKEND.json and transfer.png.
"""

import argparse
import statistics
import sys

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.images import data_sets
from keras_jamba import presets
from keras_jamba.training import Batches, PhotoAugmentation, optimizer

RATES = (3e-4, 1e-3, 3e-3)
# The seed of the draw on which the learning rate is chosen.
CHOICE = 100
STARTS = ("preset", "scratch")


def digits():
    """Returns `(train, test)` of the digits, each `(images (n, 32, 32, 3) uint8, labels)`."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * 255 / 16).astype("uint8").repeat(4, 1).repeat(4, 2)
    images = images[..., None].repeat(3, -1)
    half = len(images) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])


def fashion(folder):
    """Returns `(train, test)` of Fashion-MNIST, as `digits`."""
    data = data_sets.load("fashion", folder)
    padded = lambda images: np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))).repeat(3, -1)  # noqa: E731
    return tuple((padded(images), labels) for images, labels in (data.train, data.test))


def drawn(labels, per_class, seed):
    """Returns indices of `per_class` examples of each class."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)])


def new_model(preset, start, seed):
    """Returns a model for ten classes of bytes: the weights of a preset with a new head, or random weights."""
    keras.utils.set_random_seed(seed)
    # A head for eleven classes is replaced, so that no task gets the head of the preset's own ten classes.
    model = keras_jamba.DHCJamba.from_preset(
        preset, load_weights=start == "preset", num_classes=11, class_names=None, pixel_range=(0, 255)
    )
    return model


class Trainings:
    """Trainings with one compiled model per learning rate, which gets the initial weights of each training.

    Args:
        preset: a name or a folder.
        seeds: the seeds of all trainings.
        steps, batch_size: steps per training and images per step.
    """

    def __init__(self, preset, seeds, steps, batch_size):
        self.steps, self.batch_size, self.models = steps, batch_size, {}
        self.initial = {
            (start, seed): new_model(preset, start, seed).get_weights() for start in STARTS for seed in seeds
        }
        for rate in RATES:
            model = self.models[rate] = new_model(preset, "scratch", 0)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer(model, steps, rate), loss)
            model.optimizer.build(model.trainable_variables)

    def accuracy(self, start, images, labels, mirror, rate, seed, test):
        """Returns the accuracy in percent on `test` after training on images and labels."""
        model = self.models[rate]
        model.set_weights(self.initial[start, seed])
        for variable in model.optimizer.variables:
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
        size = min(self.batch_size, len(images))
        batches = Batches((images, labels), size, seed, transform=PhotoAugmentation(mirror=mirror))
        epochs = -(-self.steps // batches.steps_per_epoch)
        model.fit(batches, epochs=epochs, verbose=0)
        others, expected = test
        predicted = model.predict(others, batch_size=500, verbose=0).argmax(-1)
        return round(100 * float((predicted == expected).mean()), 2)


def rows_of(trainings, name, train, test, sizes, mirror, seeds):
    """Yields a row of results per number of images per class."""
    images, labels = train

    def accuracy(start, per_class, rate, seed, test):
        chosen = drawn(labels, per_class, seed)
        return trainings.accuracy(start, images[chosen], labels[chosen], mirror, rate, seed, test)

    for per_class in sizes:
        row = {"task": name, "images per class": per_class}
        others = np.setdiff1d(np.arange(len(labels)), drawn(labels, per_class, CHOICE))[:2000]
        for start in STARTS:
            found = {rate: accuracy(start, per_class, rate, CHOICE, (images[others], labels[others])) for rate in RATES}
            rate = max(found, key=found.get)
            row[start] = {
                "learning rate": rate,
                "accuracy": [accuracy(start, per_class, rate, seed, test) for seed in seeds],
            }
        print(row, file=sys.stderr, flush=True)
        yield row


def draw(rows, file):
    """Draws mean accuracies with their least and largest values, by images per class, one panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.6), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        chosen = [row for row in rows if row["task"] == task]
        sizes = [row["images per class"] for row in chosen]
        for start, colour in zip(STARTS, ("tab:blue", "tab:orange"), strict=True):
            values = [row[start]["accuracy"] for row in chosen]
            axis.plot(sizes, [statistics.mean(v) for v in values], "o-", color=colour, label=start)
            axis.fill_between(sizes, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2)
        axis.set(title=task, xscale="log", xlabel="training images per class", ylabel="test accuracy in %")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", help="a name, or a folder")
    parser.add_argument("--data", help=f"folder of the data sets; default: {data_sets.VARIABLE}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    if presets.read(args.preset)[0]["weights"] is None:
        parser.error(f"The preset must have weights. Received: {args.preset!r} without. Pass the folder of a training.")
    trainings = Trainings(args.preset, [*args.seeds, CHOICE], args.steps, args.batch_size)
    rows = [
        *rows_of(trainings, "digits", *digits(), (5, 10, 50), False, args.seeds),
        *rows_of(trainings, "Fashion-MNIST", *fashion(args.data), (10, 50, 250), True, args.seeds),
    ]
    spread = lambda values: f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"  # noqa: E731
    shown = [
        {"task": row["task"], "images per class": row["images per class"]}
        | {start: spread(row[start]["accuracy"]) for start in STARTS}
        | {"gain": f"{statistics.mean(row['preset']['accuracy']) - statistics.mean(row['scratch']['accuracy']):+.1f}"}
        for row in rows
    ]
    print(measure.table(shown, list(shown[0])))
    measure.record(f"transfer_{keras.backend.backend()}", {**vars(args) | {"data": None}, "rows": rows})
    draw(rows, measure.RESULTS / "transfer.png")


if __name__ == "__main__":
    main()

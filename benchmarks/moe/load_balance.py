"""Load balance of the experts on digits, with and without the auxiliary losses.

    KERAS_BACKEND=jax python -m benchmarks.moe.load_balance

Trains 0.8 M parameters (`images.sizes`) on the images and with the recipe of examples/image_classification.py, for
fewer epochs. Both variants use the same seeds. Prints means over seeds: the usage of the trained experts over the
complete training set, the losses without the auxiliary losses, and the accuracy on the test half. Writes
results/load_balance_BACKEND.json and .png.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import keras
import matplotlib
import numpy as np

from benchmarks import measure
from benchmarks.images.sizes import untrained

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from data import load  # noqa: E402

from keras_jamba import training  # noqa: E402

matplotlib.use("Agg")
FORMS = {"with": {}, "without": {"balance_coefficient": 0.0, "z_coefficient": 0.0}}


def train(data, seed, epochs, coefficients):
    """Returns the trained model, and its load over time: `{layer: (measurements, experts)}`."""
    keras.utils.set_random_seed(seed)
    model = untrained("small", image_shape=(8, 8, 1), downsample=2, dropout=0.2, drop_path=0.4, **coefficients)
    usage = training.ExpertUsage()
    recipe = replace(training.recipes.DIGITS, epochs=epochs)
    callbacks = [training.Monitor([usage], every=10)]
    recipe.fit(model, data.train_images, data.train_labels, seed, callbacks=callbacks, verbose=0)
    return model, {name: np.array(shares) for name, shares in usage.history.items()}


def usage_of(model, images):
    """Returns the expert shares of each layer over all images, `(layers, experts)`."""
    routing = model.extract_features(images)["routing"]
    return np.array([keras.ops.convert_to_numpy(layer["expert_share"]) for layer in routing.values()])


def figures(model, data):
    shares = usage_of(model, data.train_images)
    load = shares * shares.shape[1]
    entropy = -(shares * np.log(shares + 1e-30)).sum(axis=1) / np.log(shares.shape[1])
    logits = model.predict(data.test_images, verbose=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {
        "entropy": float(entropy.mean()),
        "max_load": float(load.max(axis=1).mean()),
        "dead_experts": int((load < 0.01).sum()),
        "train_loss": float(loss(data.train_labels, model.predict(data.train_images, verbose=0))),
        "test_loss": float(loss(data.test_labels, logits)),
        "test_accuracy": 100 * float((logits.argmax(axis=-1) == data.test_labels).mean()),
    }


def plot(histories, file):
    """Plots the load of the experts over time for the first seed: one column per form, one row per layer."""
    from matplotlib import pyplot

    layers = list(histories["with"])
    grid, panels = pyplot.subplots(
        len(layers), 2, sharex=True, sharey=True, figsize=(9, 1 + 1.5 * len(layers)), layout="constrained"
    )
    for column, form in enumerate(FORMS):
        for row, layer in enumerate(layers):
            load = histories[form][layer].T * histories[form][layer].shape[1]
            image = panels[row, column].imshow(load, aspect="auto", vmin=0, vmax=3, interpolation="nearest")
            panels[row, column].set(ylabel=f"{layer.split('/')[0]}\nexpert" if not column else "")
        panels[0, column].set(title=f"{form} auxiliary losses")
        panels[-1, column].set(xlabel="10 steps")
    grid.colorbar(image, ax=panels, label="load, 1 is even, from 3 on the same colour")
    grid.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    data, runs, histories = load("digits"), [], {}
    for seed in args.seeds:
        for form, coefficients in FORMS.items():
            model, history = train(data, seed, args.epochs, coefficients)
            histories.setdefault(form, history)
            runs.append({"seed": seed, "auxiliary losses": form} | figures(model, data))
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in runs[-1].items()}, flush=True)
    names = [name for name in runs[0] if name not in ("seed", "auxiliary losses")]
    means = {
        form: {
            name: round(statistics.mean(r[name] for r in runs if r["auxiliary losses"] == form), 4) for name in names
        }
        for form in FORMS
    }
    print(measure.table([{"auxiliary losses": form} | means[form] for form in FORMS], ["auxiliary losses", *names]))
    name = f"load_balance_{keras.backend.backend()}"
    measure.record(name, {"epochs": args.epochs, "means": means, "runs": runs})
    plot(histories, measure.RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()

"""Fine-tunes a trained model on another task with low-rank adapters, and quantizes its weights.

The preset for handwritten digits was trained on upright digits only, and guesses at rotated ones. The script trains
adapters of the projections, and the head, on rotated digits: less than a quarter of all weights. The other weights
stay unchanged, so the model without the adapters is the original one. Then the script quantizes the original weights
to int8 and int4.

    python examples/fine_tuning.py [--rank 16] [--epochs 60]

Writes to --output: adapters.safetensors (for `load_lora`), int8/ (a preset), fine_tuning.png, results.json.
"""

import argparse
import json
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import keras
import matplotlib
import numpy as np
from data import load

import keras_jamba
from keras_jamba.training import recipes

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402, since pyplot requires a screen unless Agg is chosen before

PRESET = "digits"
MODES = {"float32": None, "int8": "int8", "int4": "int4"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16, help="width of the adapters (default: 16)")
    parser.add_argument("--epochs", type=int, default=60, help="default: 60")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--output", type=Path, default=Path("runs") / "fine_tuning", help="default: runs/fine_tuning")
    parser.add_argument("--smoke", action="store_true", help="one epoch on a few images, to see that all of it runs")
    return parser.parse_args()


def rotated(images):
    """Returns the images rotated by 90 degrees."""
    return np.ascontiguousarray(np.rot90(images, axes=(1, 2)))


def accuracy(model, images, labels):
    """Returns the percentage of images that the model classifies correctly."""
    return 100 * float((model.predict(images, verbose=0).argmax(-1) == labels).mean())


def fine_tune(model, data, args):
    """Trains adapters on rotated images and returns the loss of each epoch."""
    keras.utils.set_random_seed(args.seed)
    model.enable_lora(args.rank, ["attention", "mamba", "feed_forward"], also_train="head")
    recipe = replace(recipes.DIGITS, epochs=args.epochs, learning_rate=1e-2)
    history = recipe.fit(model, rotated(data.train_images), data.train_labels, args.seed, verbose=0)
    return history.history["loss"]


def quantize(data, output):
    """Returns per data type: accuracy on upright images, bytes of the weights, and images per second.

    Saves the int8 model as a preset in `output / "int8"`.
    """
    quantized = {}
    for name, mode in MODES.items():
        given = {} if mode is None else {"quantization": mode}
        model = keras_jamba.DHCJamba.from_preset(PRESET, **given)
        right = accuracy(model, data.test_images, data.test_labels)  # compiles the model, too
        times = []
        for _ in range(3):
            started = time.perf_counter()
            model.predict(data.test_images, verbose=0)
            times.append(time.perf_counter() - started)
        size = sum(keras.ops.convert_to_numpy(v.value).nbytes for v in model.weights)
        rate = len(data.test_images) / statistics.median(times)
        quantized[name] = {"accuracy": right, "bytes": size, "images_per_second": round(rate)}
        print(f"{name:>10}  {right:6.2f} % right  {size / 1024:6.0f} KiB  {rate:7.0f} images per second")
        if mode == "int8":
            shutil.rmtree(output / "int8", ignore_errors=True)
            model.save_to_preset(output / "int8")
    return quantized


def draw(images, tuning, quantized, file):
    figure = plt.figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    grid = left.add_gridspec(2, 3, width_ratios=(1, 2.2, 2.2))
    for row, (name, image) in enumerate((("upright", images[0]), ("turned", rotated(images[:1])[0]))):
        axis = left.add_subplot(grid[row, 0])
        axis.imshow(image[..., 0], cmap="gray_r")
        axis.set(xticks=[], yticks=[], xlabel=name)
    axis = left.add_subplot(grid[:, 1])
    places = np.arange(2)
    for i, (name, values) in enumerate(tuning["accuracy"].items()):
        bars = axis.bar(places + 0.4 * i - 0.2, [values["upright"], values["turned"]], 0.38, label=name)
        axis.bar_label(bars, fmt="%.0f")
    axis.set_xticks(places, ["upright", "turned"])
    axis.set(ylim=(0, 125), ylabel="% of the test images right", title="before and after")
    axis.legend(loc="upper center", ncols=2, frameon=False, fontsize="small")
    axis = left.add_subplot(grid[:, 2])
    axis.plot(np.arange(1, len(tuning["loss"]) + 1), tuning["loss"])
    axis.set(xlabel="epoch", title=f"loss, {tuning['share']:.0%} of weights trained")
    axis = right.subplots()
    bars = axis.barh(list(quantized), [row["bytes"] / 1024 for row in quantized.values()], color="C2")
    axis.bar_label(bars, [f" {row['accuracy']:.1f} % right" for row in quantized.values()])
    axis.set(xlabel="weights, KiB", title="quantized, upright images", xlim=(0, 720))
    axis.invert_yaxis()
    figure.savefig(file, dpi=120)


def main():
    args = arguments()
    data = load("digits")
    if args.smoke:
        data, args.epochs = data.first(128), 1
    model = keras_jamba.DHCJamba.from_preset(PRESET)
    both = {"upright": data.test_images, "turned": rotated(data.test_images)}
    found = {"before": {name: accuracy(model, x, data.test_labels) for name, x in both.items()}}
    started = time.perf_counter()
    loss = fine_tune(model, data, args)
    seconds = time.perf_counter() - started
    found["after"] = {name: accuracy(model, x, data.test_labels) for name, x in both.items()}
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_lora(args.output / "adapters.safetensors")
    share = sum(int(np.prod(v.shape)) for v in model.trainable_weights) / model.count_params()
    for when, rows in found.items():
        for name, value in rows.items():
            print(f"{name:>10} {when:>6} fine-tuning  {value:6.2f} % of the test images right")
    quantized = quantize(data, args.output)
    tuning = {"accuracy": found, "loss": loss, "share": share, "seconds": round(seconds, 1), "rank": args.rank}
    draw(data.test_images, tuning, quantized, args.output / "fine_tuning.png")
    record = {"backend": keras.backend.backend(), "seed": args.seed, "fine_tuning": tuning, "quantized": quantized}
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    size = (args.output / "adapters.safetensors").stat().st_size / 1024
    print(f"{seconds:.0f} s of training. adapters.safetensors ({size:.0f} KiB), int8/ and more are in {args.output}")


if __name__ == "__main__":
    main()

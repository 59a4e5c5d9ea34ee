"""Accuracy of low-rank adapters on another task, and of quantized weights on the first one.

    KERAS_BACKEND=jax python -m benchmarks.training.adapters

The preset `digits` was trained on upright digits only. The program trains adapters of its projections, and the head, on
digits that are turned by 90 degrees. The test digits are by other people than the training digits. Then it quantizes
the original weights to int8 and int4. The peer is the preset in float32: before training, and for size and speed.
Writes results/adapters_BACKEND.json and .png.
"""

import argparse
import functools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import keras
import matplotlib
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.images.quality_digits import split
from keras_jamba.training import recipes

matplotlib.use("Agg")
MODES = {"float32": None, "int8": "int8", "int4": "int4"}


def preset(folder="digits", **given):
    return keras_jamba.DHCJamba.from_preset(folder, **given)


def turned(images):
    """Returns the images turned by 90 degrees."""
    return np.ascontiguousarray(np.rot90(images, axes=(1, 2)))


def accuracy(model, images, labels):
    """Returns the percentage of images that the model classifies correctly."""
    return 100 * float((model.predict(images, verbose=0).argmax(-1) == labels).mean())


def check_same_outputs(first, second, images, atol):
    outputs = [model.predict(images, verbose=0) for model in (first, second)]
    np.testing.assert_allclose(*outputs, atol=atol)


def fine_tune(data, args):
    """Returns the accuracy before and after the training of adapters, the losses of the epochs, and more."""
    images, labels, test_images, test_labels = data
    model, original = preset(), preset()
    inputs = {"upright": test_images, "turned": turned(test_images)}
    found = {"before": {name: accuracy(model, x, test_labels) for name, x in inputs.items()}}
    keras.utils.set_random_seed(args.seed)
    share = model.enable_lora(args.rank, ["attention", "mamba", "feed_forward"], also_train="head")["share"]
    check_same_outputs(model, original, test_images, 1e-5)
    recipe = replace(recipes.DIGITS, epochs=args.epochs, learning_rate=1e-2)
    started = time.perf_counter()
    loss = recipe.fit(model, turned(images), labels, args.seed, verbose=0).history["loss"]
    seconds = time.perf_counter() - started
    found["after"] = {name: accuracy(model, x, test_labels) for name, x in inputs.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapters.safetensors"
        model.save_lora(file)
        size = file.stat().st_size
        original.load_lora(file)
    check_same_outputs(model, original, inputs["turned"], 1e-4)
    return {"accuracy": found, "loss": loss, "share": share, "seconds": round(seconds, 1), "bytes of the file": size}


def quantize(data, rounds):
    """Returns per data type: accuracy on upright images, bytes of the weights, and images per second."""
    _, _, images, labels = data
    models = {name: preset(quantization=mode) if mode else preset() for name, mode in MODES.items()}
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            model.save_to_preset(Path(folder) / name)
            check_same_outputs(model, preset(Path(folder) / name), images, 1e-5)
    times = measure.interleaved(
        {name: functools.partial(model.predict, images, verbose=0) for name, model in models.items()}, rounds
    )
    return {
        name: {
            "accuracy": accuracy(model, images, labels),
            "bytes": sum(keras.ops.convert_to_numpy(v.value).nbytes for v in model.weights),
            "images_per_second": round(len(images) / times[name]),
        }
        for name, model in models.items()
    }


def draw(image, adapters, quantized, file):
    """Draws accuracy and loss of the adapters, and size and accuracy of quantized weights."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    grid = left.add_gridspec(2, 3, width_ratios=(1, 2.2, 2.2))
    for row, (name, pixels) in enumerate((("upright", image), ("turned", turned(image[None])[0]))):
        axis = left.add_subplot(grid[row, 0])
        axis.imshow(pixels[..., 0], cmap="gray_r")
        axis.set(xticks=[], yticks=[], xlabel=name)
    axis = left.add_subplot(grid[:, 1])
    places = np.arange(2)
    for i, (name, values) in enumerate(adapters["accuracy"].items()):
        bars = axis.bar(places + 0.4 * i - 0.2, [values["upright"], values["turned"]], 0.38, label=name)
        axis.bar_label(bars, fmt="%.0f")
    axis.set_xticks(places, ["upright", "turned"])
    axis.set(ylim=(0, 125), ylabel="% of the test images right", title="before and after")
    axis.legend(loc="upper center", ncols=2, frameon=False, fontsize="small")
    axis = left.add_subplot(grid[:, 2])
    axis.plot(np.arange(1, len(adapters["loss"]) + 1), adapters["loss"])
    axis.set(xlabel="epoch", title=f"loss, {adapters['share']:.0%} of weights trained")
    axis = right.subplots()
    bars = axis.barh(list(quantized), [row["bytes"] / 1024 for row in quantized.values()], color="C2")
    axis.bar_label(bars, [f" {row['accuracy']:.1f} % right" for row in quantized.values()])
    axis.set(xlabel="weights, KiB", title="quantized, upright images", xlim=(0, 720))
    axis.invert_yaxis()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16, help="width of the adapters")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    data = split("D2", args.seed)
    adapters = fine_tune(data, args)
    for when, row in adapters["accuracy"].items():
        print(f"{when} training: {row['upright']:.2f} % of upright, {row['turned']:.2f} % of turned digits right")
    quantized = quantize(data, args.rounds)
    for name, row in quantized.items():
        print(f"{name}: {row['accuracy']:.2f} % right, {row['bytes']:,} bytes, {row['images_per_second']:,} images/s")
    name = f"adapters_{keras.backend.backend()}"
    draw(data[2][0], adapters, quantized, measure.RESULTS / f"{name}.png")
    measure.record(name, vars(args) | {"adapters": adapters, "quantized": quantized})


if __name__ == "__main__":
    main()

"""Speed of image training on a GPU: DHCJamba, with a ViT of as many parameters and tokens as the peer.

    KERAS_BACKEND=jax python -m benchmarks.images.gpu [--profile]

DHCJamba is `sizes.SIZES["small"]`: 64 tokens, 0.8 M parameters. The architecture of the preset `small`, which has 256
tokens, is in the same run. All models train with `recipes.CIFAR10`. First, each must learn to tell ten colours apart.
Then, in one interleaved run, the benchmark measures images per second of `fit` over fixed arrays, of `fit` with the
recipe's augmentation, and milliseconds of `train_on_batch`. `--profile` also measures how long the device is busy per
step; the rest of a step's time is the host's. PyTorch multiplies in TF32, as JAX does by default. Writes
results/gpu_images_BACKEND.json.
"""

import argparse
import functools

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.device_time import busy_milliseconds
from benchmarks.images.peers import of_equal_size, vit
from benchmarks.images.photo_models import PRESETS
from benchmarks.images.sizes import untrained
from keras_jamba.training import Batches, recipes
from keras_jamba.training.data.augmentation import one_hot

IMAGE, CLASSES = (32, 32, 3), 10
BACKEND = keras.backend.backend()


def coloured_images(count, seed=0):
    """Returns noisy images `(n, 32, 32, 3)` uint8 of ten colours, and their one-hot labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    colours = np.random.default_rng(1).integers(50, 200, (CLASSES, 3))
    images = colours[labels][:, None, None] + rng.normal(0, 40, (count, *IMAGE))
    return np.clip(images, 0, 255).astype("uint8"), one_hot(labels, CLASSES)


def models():
    """Returns `{name: model}`. All take floats from 0 to 1."""
    ours = untrained("small")
    return {
        "DHCJamba": ours,
        "ViT": of_equal_size(vit, range(16, 257, 16), IMAGE, ours.count_params()),
        "preset small": keras_jamba.DHCJamba(CLASSES, IMAGE, **PRESETS["small"]),
    }


def check_that_it_learns(name, model, images, labels, batch_size):
    """Trains a model, and raises AssertionError unless it tells the colours apart."""
    recipes.CIFAR10.compile(model, 20 * (len(images) // batch_size))
    history = model.fit(images, labels, batch_size=batch_size, epochs=4, verbose=0).history
    loss, accuracy = history["loss"][-1], history["accuracy"][-1]
    if not (np.isfinite(loss) and accuracy > 0.9):
        raise AssertionError(f"{name} must tell ten colours apart. Received: loss {loss}, accuracy {accuracy}.")


def augmented(images, labels, batch_size, workers):
    """Returns batches of floats with the recipe's augmentation."""
    augmentation = recipes.CIFAR10.augmentation(CLASSES)

    def transform(batch, rng):
        images, labels = augmentation(batch, rng)
        return images.astype("float32") / 255, labels

    return Batches((images, labels), batch_size, transform=transform, workers=workers)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="steps per timed call of fit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if BACKEND == "torch":
        import torch

        torch.set_float32_matmul_precision("high")
    count = args.batch_size * args.steps
    images, labels = coloured_images(count)
    floats = images.astype("float32") / 255
    batches = augmented(images, labels, args.batch_size, args.workers)
    made, functions = models(), {}
    for name, model in made.items():
        check_that_it_learns(name, model, floats, labels, args.batch_size)
        once = functools.partial(model.train_on_batch, floats[: args.batch_size], labels[: args.batch_size])
        functions[name, "fit"] = functools.partial(model.fit, floats, labels, batch_size=args.batch_size, verbose=0)
        functions[name, "augmented"] = functools.partial(model.fit, batches, verbose=0)
        functions[name, "train_on_batch"] = lambda once=once: [once() for _ in range(20)]
    seconds = measure.interleaved(functions, args.rounds)
    results = {}
    for name, model in made.items():
        row = results[name] = {"parameters": model.count_params()}
        for kind in ("fit", "augmented"):
            row[f"{kind}, images per second"] = round(count / seconds[name, kind])
        row["augmented / plain"] = round(seconds[name, "fit"] / seconds[name, "augmented"], 3)
        row["train_on_batch, ms"] = round(1e3 * seconds[name, "train_on_batch"] / 20, 2)
        row["step of fit, ms"] = round(1e3 * seconds[name, "fit"] / args.steps, 3)
        if args.profile:
            short = functools.partial(model.fit, floats[: 20 * args.batch_size], labels[: 20 * args.batch_size])
            busy, longest = busy_milliseconds(functools.partial(short, batch_size=args.batch_size, verbose=0), 20)
            row["device, ms per step"] = round(busy, 3)
            row["longest kernels"] = [[kernel[:100], round(ms, 4), round(calls, 1)] for kernel, ms, calls in longest]
    ratio = seconds["ViT", "fit"] / seconds["DHCJamba", "fit"]
    print(measure.table([{"model": name, **row} for name, row in results.items()], ["model", *list(row)[:6]]))
    print(f"DHCJamba trains {ratio:.2f} times as fast as the ViT.")
    measure.record(f"gpu_images_{BACKEND}", {**vars(args), "ratio": round(ratio, 3), "models": results})


if __name__ == "__main__":
    main()

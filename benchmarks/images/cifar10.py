"""Trains DHCJamba on CIFAR-10 with the complete recipe, and measures the accuracy on the 10,000 test images.

    KERAS_BACKEND=jax python -m benchmarks.images.cifar10 small
    KERAS_BACKEND=jax python -m benchmarks.images.cifar10 medium --downsample 2 --workers 8

Reads the files that keras.datasets.cifar10 unpacks, and downloads nothing. It uses the test images once, after the last
of 200 epochs. Writes cifar10_PRESET_BACKEND.json to --output. No number of this benchmark is published yet.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import measure

# Importing Keras writes a file to the folder of the data set. Functions therefore import it where they use it.
FOLDER = Path("datasets", "cifar-10-batches-py-target", "cifar-10-batches-py")
TRAIN, TEST = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
TINY = dict(d_model=16, num_layers=1, mamba_ratio=None, moe_frequency=1, num_experts=2)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=("small", "medium", "large"))
    parser.add_argument("--downsample", type=int, choices=(2, 4), default=4, help="4: 64 tokens, 2: 256 tokens")
    parser.add_argument("--epochs", type=int, default=None, help="default: the recipe's 200")
    parser.add_argument("--batch-size", type=int, default=None, help="default: the recipe's 128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="threads for augmentation, without effect on the images")
    parser.add_argument("--output", type=Path, default=measure.RESULTS)
    parser.add_argument("--smoke", action="store_true", help="run a tiny model")
    return parser.parse_args()


def data_folder():
    """Returns the folder of the data set. Exits if a file is missing."""
    folder = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / FOLDER
    missing = [name for name in (*TRAIN, *TEST) if not (folder / name).is_file()]
    if missing:
        sys.exit(
            "CIFAR-10 must be on disk where keras.datasets.cifar10 unpacks it; nothing is downloaded here. "
            f"Received: {folder} without {', '.join(missing)}. On a machine with internet access run "
            '`python -c "import keras; keras.datasets.cifar10.load_data()"` (170 MB), and copy the folder '
            f"{FOLDER.parent} here."
        )
    return folder


def load(files):
    """Returns images `(n, 32, 32, 3)` from 0 to 1 and labels `(n,)`."""
    import numpy as np
    from keras.src.datasets.cifar import load_batch  # it unpickles only arrays

    images, labels = zip(*map(load_batch, map(str, files)), strict=True)
    return np.concatenate(images).transpose(0, 2, 3, 1).astype("float32") / 255, np.concatenate(labels)


def recipe_of(args):
    """Returns `recipes.CIFAR10` with the changes of the command line."""
    from keras_jamba.training import recipes

    changed = dict(epochs=args.epochs, batch_size=args.batch_size)
    return replace(recipes.CIFAR10, **{name: value for name, value in changed.items() if value is not None})


def trained(args, recipe, images, labels):
    """Returns the model, the metrics of the last epoch, and the seconds of training."""
    import keras

    from benchmarks.images.sizes import untrained

    keras.utils.set_random_seed(args.seed)
    sizes = dict(num_classes=10, image_shape=(32, 32, 3), downsample=args.downsample) | (TINY if args.smoke else {})
    model = untrained(args.preset, **sizes)
    started = time.perf_counter()
    history = recipe.fit(model, images, labels, seed=args.seed, workers=args.workers, verbose=2)
    last = {name: round(float(values[-1]), 4) for name, values in history.history.items()}
    return model, last, time.perf_counter() - started


def main():
    args = arguments()
    folder = data_folder()
    images, labels = load([folder / name for name in TRAIN])
    test_images, test_labels = load([folder / name for name in TEST])
    recipe = recipe_of(args)
    model, last, seconds = trained(args, recipe, images, labels)
    logits = model.predict(test_images, batch_size=recipe.batch_size, verbose=0)
    accuracy = 100 * float((logits.argmax(-1) == test_labels).mean())

    import keras

    from keras_jamba import _backend

    backend = keras.backend.backend()
    results = {name: getattr(args, name) for name in ("preset", "downsample", "seed", "smoke")} | {
        "epochs": recipe.epochs,
        "batch size": recipe.batch_size,
        "device": _backend.device.device_name(),
        "parameters": model.count_params(),
        "training images": len(images),
        "test images": len(test_images),
        "test accuracy": round(accuracy, 2),
        "last epoch": last,
        "seconds of training": round(seconds, 1),
    }
    measure.RESULTS = args.output
    file = measure.record(f"cifar10_{args.preset}_{backend}", results)
    print(f"{accuracy:.2f} % of {len(test_images)} test images right, {seconds:.0f} s of training; {file}")


if __name__ == "__main__":
    main()

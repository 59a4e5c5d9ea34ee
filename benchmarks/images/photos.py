"""Trains a model on CIFAR-10 (JPEG 75) or Fashion-MNIST, and measures its accuracy.

    KERAS_BACKEND=jax python -m benchmarks.images.photos base --validation --epochs 20
    KERAS_BACKEND=jax python -m benchmarks.images.photos ResNet-56 --seed 1 --output runs/resnet_1

`photo_models.py` has the models, and `data_sets.py` says where the images come from. All models get the same recipe,
`recipes.CIFAR10`, with the changes of the command line. `--validation` trains on all but the last 5,000 training images
and measures on these: choices are made this way. Without it, the training uses all training images, and the test images
are looked at once, after the last epoch. `--preset` writes the weights in float16, and measures the loaded preset.
Writes `result.json` with the learning curve to --output.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.images import data_sets
from benchmarks.images.photo_models import CANDIDATES, PEERS, candidate
from keras_jamba import _backend
from keras_jamba.training import PhotoAugmentation, recipes

RECIPE = ("epochs", "batch_size", "learning_rate", "weight_decay", "ema_momentum", "label_smoothing")
AUGMENTATION = ("shift", "erasing", "cut_mix")


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=(*CANDIDATES, *PEERS))
    parser.add_argument("--data", help=f"folder of the data sets; default: {data_sets.VARIABLE}")
    parser.add_argument("--set", choices=tuple(data_sets.READERS), default="cifar10")
    parser.add_argument("--validation", action="store_true", help="measure on the last 5,000 training images")
    parser.add_argument("--options", type=json.loads, default={}, help="constructor arguments of DHCJamba, as JSON")
    for name in RECIPE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int if name in RECIPE[:2] else float)
    parser.add_argument("--shift", type=float, default=1 / 8)
    parser.add_argument("--erasing", type=float, default=0.25)
    parser.add_argument("--cut-mix", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", default="float32", help="dtype policy")
    parser.add_argument("--workers", type=int, default=4, help="threads for augmentation")
    parser.add_argument("--first", type=int, help="use only the first images of each split")
    parser.add_argument("--output", type=Path, default=Path("runs/photos"))
    parser.add_argument("--preset", type=Path, help="new folder for the weights in float16, which are then measured")
    return parser.parse_args(given)


def recipe_of(args):
    """Returns `recipes.CIFAR10` with the changes of the command line."""
    changed = {name: getattr(args, name) for name in RECIPE if getattr(args, name) is not None}
    options = {name: getattr(args, name) for name in AUGMENTATION}
    augmentation = lambda num_classes: PhotoAugmentation(**options, num_classes=num_classes)  # noqa: E731
    return replace(recipes.CIFAR10, augmentation=augmentation, **changed)


def splits_of(args):
    """Returns `((images, labels), (images, labels), class_names)`: for training, and for measuring."""
    data = data_sets.load(args.set, args.data)
    splits = data.validation_split() if args.validation else (data.train, data.test)
    first = slice(args.first)
    return *((images[first], labels[first]) for images, labels in splits), data.class_names


def model_of(args, image_shape, class_names):
    if args.model in PEERS:
        if args.preset is not None:
            raise ValueError(f"A preset must be a DHCJamba. Received: {args.model!r}. Leave out --preset.")
        return PEERS[args.model](image_shape, len(class_names))
    return candidate(args.model, image_shape, len(class_names), class_names=class_names, **args.options)


class Clock(keras.callbacks.Callback):
    """Prints each epoch, and keeps the time of its end."""

    def __init__(self, name):
        super().__init__()
        self.name, self.ends = name, []

    def on_epoch_end(self, epoch, logs):
        self.ends.append(time.perf_counter())
        figures = " ".join(f"{name} {float(logs[name]):.4f}" for name in ("loss", "accuracy"))
        print(f"{self.name}: epoch {epoch}, {figures}", flush=True)


def calibration_error(probabilities, labels, bins=15):
    """Returns the expected calibration error in percent (Guo et al. 2017): bins of equal width by confidence."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[places == i].sum() - confidence[places == i].sum()) for i in range(bins)]
    return 100 * float(sum(gaps)) / len(labels)


def measured(model, images, labels):
    """Returns accuracy and calibration error in percent, and the predicted classes."""
    logits = model.predict(images, batch_size=500, verbose=0).astype("float64")
    if not np.isfinite(logits).all():
        raise AssertionError("The logits must be finite. Received: NaN or infinity. The training diverged.")
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    predicted = logits.argmax(-1)
    found = {
        "accuracy": round(100 * float((predicted == labels).mean()), 2),
        "calibration error": round(calibration_error(powers / powers.sum(-1, keepdims=True), labels), 2),
    }
    return found, predicted


def run(args):
    """Trains and measures a model. Returns `(model, results)`."""
    keras.config.set_dtype_policy(args.policy)
    keras.utils.set_random_seed(args.seed)
    (images, labels), (other_images, other_labels), class_names = splits_of(args)
    recipe = recipe_of(args)
    model = model_of(args, images.shape[1:], class_names)
    clock, started = Clock(args.model), time.perf_counter()
    history = recipe.fit(model, images, labels, args.seed, callbacks=[clock], verbose=0, workers=args.workers).history
    seconds, epochs = time.perf_counter() - started, np.diff(clock.ends)
    if args.preset is not None:
        model.save_to_preset(args.preset, weights_dtype="float16")
        model = keras_jamba.DHCJamba.from_preset(args.preset)
    found, _ = measured(model, other_images, other_labels)
    return model, {
        "backend": keras.backend.backend(),
        "device": _backend.device.device_name(),
        "parameters": model.count_params(),
        "images": len(images),
        "recipe": {name: getattr(recipe, name) for name in RECIPE}
        | {name: getattr(args, name) for name in AUGMENTATION},
        "validation" if args.validation else "test": found,
        "seconds": round(seconds, 1),
        "images per second": round(len(images) / float(np.median(epochs))) if len(epochs) else None,
        "history": {name: [round(float(value), 4) for value in values] for name, values in history.items()},
    }


def main():
    args = arguments()
    _, results = run(args)
    args.output.mkdir(parents=True, exist_ok=True)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    given.pop("data")
    document = {"arguments": given, "machine": measure.machine(), **results}
    (args.output / "result.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    shown = ("parameters", "validation" if args.validation else "test", "images per second", "seconds")
    print(args.model, {name: results[name] for name in shown}, f"in {args.output}", flush=True)


if __name__ == "__main__":
    main()

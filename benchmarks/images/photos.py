"""Trains a model on CIFAR-10 (JPEG 75) or Fashion-MNIST, and measures its accuracy.

    KERAS_BACKEND=jax python -m benchmarks.images.photos small --preset runs/small
    KERAS_BACKEND=jax python -m benchmarks.images.photos "mean readout" --validation --epochs 30
    KERAS_BACKEND=jax python -m benchmarks.images.photos ResNet-56 --output runs/resnet

`photo_models.py` has the models, `photo_trainings.py` their settings, and `data_sets.py` says where the images come
from. `--validation` trains on all but the last 5,000 training images and measures on these: choices are made this way.
Without it, the training uses all training images, and the test images are looked at once, after the last epoch.
`--preset` writes the weights in float16, and measures the loaded preset. Writes `result.json` with the learning curve
to --output.
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
from benchmarks.images import data_sets, preset_readme
from benchmarks.images.photo_models import CANDIDATES, PEERS, PRESETS, candidate
from benchmarks.images.photo_trainings import AUGMENTATION, RECIPE, training_of
from benchmarks.images.quality_digits import corruptions
from keras_jamba import _backend
from keras_jamba.training import PhotoAugmentation, recipes


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=(*PRESETS, *CANDIDATES, *PEERS))
    parser.add_argument("--data", help=f"folder of the data sets; default: {data_sets.VARIABLE}")
    parser.add_argument("--set", choices=tuple(data_sets.READERS))
    parser.add_argument("--validation", action="store_true", help="measure on the last 5,000 training images")
    parser.add_argument("--options", type=json.loads, default={}, help="constructor arguments of DHCJamba, as JSON")
    for name, kind in RECIPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    for name in AUGMENTATION:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help="see PhotoAugmentation")
    parser.add_argument("--policy", help="dtype policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="threads for augmentation")
    parser.add_argument("--first", type=int, help="use only the first images of each split")
    parser.add_argument("--output", type=Path, default=Path("runs/photos"))
    parser.add_argument("--preset", type=Path, help="new folder for the weights in float16, which are then measured")
    parser.set_defaults(**training_of(parser.parse_args(given).model))
    args = parser.parse_args(given)
    if args.preset is not None and args.first is not None:
        parser.error("--preset must have all images. Received: --preset and --first. Leave out one of them.")
    if args.preset is not None and args.preset.exists():
        # `save_to_preset` would refuse it after the training.
        parser.error(f"--preset must be a new folder. Received: {str(args.preset)!r}, which exists. Choose another.")
    return args


def recipe_of(args):
    """Returns `recipes.CIFAR10` with the settings of the command line."""
    options = {name: getattr(args, name) for name in AUGMENTATION}
    augmentation = lambda num_classes: PhotoAugmentation(**options, num_classes=num_classes)  # noqa: E731
    return replace(recipes.CIFAR10, augmentation=augmentation, **{name: getattr(args, name) for name in RECIPE})


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


def predicted_logits(model, images):
    logits = model.predict(images, batch_size=500, verbose=0).astype("float64")
    if not np.isfinite(logits).all():
        raise AssertionError("The logits must be finite. Received: NaN or infinity. The training diverged.")
    return logits


def measured(model, images, labels):
    """Returns accuracy and calibration error in percent."""
    logits = predicted_logits(model, images)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return {
        "accuracy": round(100 * float((logits.argmax(-1) == labels).mean()), 2),
        "calibration error": round(calibration_error(powers / powers.sum(-1, keepdims=True), labels), 2),
    }


def corrupted_accuracies(model, images, labels):
    """Returns `{corruption: accuracy in percent}` for images of bytes."""
    # Occlusions and translations keep their share of the side.
    changed = corruptions(images.astype("float32") / 255, seed=0, scale=images.shape[1] // 8)
    right = {name: predicted_logits(model, 255 * x).argmax(-1) == labels for name, x in changed.items()}
    return {name: round(100 * float(x.mean()), 2) for name, x in right.items()}


def run(args):
    """Trains and measures a model. Returns the results."""
    keras.config.set_dtype_policy(args.policy)
    keras.utils.set_random_seed(args.seed)
    (images, labels), (other_images, other_labels), class_names = splits_of(args)
    recipe = recipe_of(args)
    model = model_of(args, images.shape[1:], class_names)
    clock, started = Clock(args.model), time.perf_counter()
    history = recipe.fit(model, images, labels, args.seed, callbacks=[clock], verbose=0, workers=args.workers).history
    seconds, epochs = time.perf_counter() - started, np.diff(clock.ends)
    # Accuracy is that of the default dtype.
    keras.config.set_dtype_policy("float32")
    trained, model = model, model_of(args, images.shape[1:], class_names)
    model.set_weights(trained.get_weights())
    if args.preset is not None:
        published = keras_jamba.DHCJamba(**model.constructor_arguments() | {"pixel_range": (0, 1)})
        published.set_weights(model.get_weights())
        published.save_to_preset(args.preset, weights_dtype="float16")
        model = keras_jamba.DHCJamba.from_preset(args.preset, pixel_range=(0, 255))
    results = {
        "backend": keras.backend.backend(),
        "device": _backend.device.device_name(),
        "parameters": model.count_params(),
        "images": len(images),
        "recipe": {name: getattr(args, name) for name in (*RECIPE, *AUGMENTATION, "policy")},
        "validation" if args.validation else "test": measured(model, other_images, other_labels),
        "seconds": round(seconds, 1),
        "images per second": round(len(images) / float(np.median(epochs))) if len(epochs) else None,
        "history": {name: [round(float(value), 4) for value in values] for name, values in history.items()},
    }
    if not args.validation:
        results["corrupted"] = corrupted_accuracies(model, other_images, other_labels)
    return results


def main():
    args = arguments()
    results = run(args)
    args.output.mkdir(parents=True, exist_ok=True)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    given.pop("data")
    document = {"arguments": given, "machine": measure.machine(), **results}
    (args.output / "result.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.preset is not None and not args.validation:
        preset_readme.write(args.preset, document)
    shown = ("parameters", "validation" if args.validation else "test", "images per second", "seconds")
    print(args.model, {name: results[name] for name in shown}, f"in {args.output}", flush=True)


if __name__ == "__main__":
    main()

"""Trains DHCJamba on real images and draws the results.

Default: the 1,797 handwritten digits of scikit-learn, without a download. The halves are not shuffled, since
different people wrote the test half. benchmarks/images/quality.py measures the accuracy over several seeds.

    python examples/image_classification.py [--dataset digits|cifar10|cifar100|mnist|FOLDER]

A FOLDER holds one folder of images per class. Writes to --output: model/ (a preset for `DHCJamba.from_preset`),
learning_curve.png, confusion_matrix.png, results.json and, if the model has experts, expert_usage.png.
"""

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import keras
import matplotlib
from data import load
from pictures import draw_confusion_matrix, draw_expert_usage, draw_learning_curve
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

import keras_jamba
from keras_jamba.training import recipes

matplotlib.use("Agg")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", help="digits, cifar10, cifar100, mnist or a folder")
    parser.add_argument(
        "--preset", default=None, help="preset with the model's sizes; default: digits for digits, else small"
    )
    parser.add_argument("--epochs", type=int, default=None, help="default: 60 for digits, else 30")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--validation",
        action="store_true",
        help="test on the last 20 %% of the training images instead, to choose a recipe",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/image_classification"))
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that all of it runs")
    return parser.parse_args()


def build(args, data):
    """Returns an untrained model with the preset's sizes and the data's image shape."""
    digits = args.dataset == "digits"
    small = dict(d_model=16, num_layers=2, mamba_ratio=1) if args.smoke else {}
    # 16 tokens for an 8 x 8 image, 256 for a 32 x 32 one.
    downsample = 2 if min(data.train_images.shape[1:3]) <= 32 else 4
    return keras_jamba.DHCJamba.from_preset(
        args.preset or ("digits" if digits else "small"),
        load_weights=False,
        num_classes=len(data.classes),
        class_names=data.classes,
        image_shape=data.train_images.shape[1:],
        downsample=downsample,
        dropout=0.2,
        drop_path=0.4,
        **small,
    )


def baselines(data):
    """Returns the test accuracy of two classical classifiers on the pixels, in percent."""
    flat = [x.reshape(len(x), -1)[:5000] for x in (data.train_images, data.test_images)]
    labels = data.train_labels[:5000], data.test_labels[:5000]
    models = {"SVC": SVC(gamma="scale", C=10), "kNN-3": KNeighborsClassifier(3)}
    return {name: 100 * float(m.fit(flat[0], labels[0]).score(flat[1], labels[1])) for name, m in models.items()}


def main():
    args = arguments()
    keras.utils.set_random_seed(args.seed)
    data = load(args.dataset)
    if args.validation:
        data = data.validation_split(0.2)
    if args.smoke:
        data = data.first(128)
    epochs = 1 if args.smoke else args.epochs or (60 if args.dataset == "digits" else 30)
    recipe = replace(recipes.DIGITS, epochs=epochs)
    model = build(args, data)
    print(
        f"{len(data.train_images)} training images, {len(data.test_images)} test images, "
        f"{model.count_params():,} parameters, on {keras.backend.backend()}"
    )

    started = time.perf_counter()
    history = recipe.fit(model, data.train_images, data.train_labels, args.seed)
    seconds = time.perf_counter() - started
    args.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.output / "model", ignore_errors=True)
    model.save_to_preset(args.output / "model")
    logits = model.predict(data.test_images, verbose=0)
    predicted = logits.argmax(axis=-1)
    accuracy = 100 * float((predicted == data.test_labels).mean())

    draw_learning_curve(history.history, args.output / "learning_curve.png")
    draw_confusion_matrix(data, predicted, args.output / "confusion_matrix.png")
    if any(part == "moe" for _, part in model.block_pattern):
        draw_expert_usage(model, args.output / "expert_usage.png")
    results = {"DHCJamba": accuracy, **baselines(data)}
    for name, value in results.items():
        print(f"{name:>10}  {value:6.2f} % of the test images right")
    record = {
        "dataset": args.dataset,
        "backend": keras.backend.backend(),
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "test_accuracy": results,
        "parameters": model.count_params(),
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{seconds:.0f} s of training. model/, pictures and results.json are in {args.output}")


if __name__ == "__main__":
    main()

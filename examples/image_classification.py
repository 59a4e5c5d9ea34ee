"""Trains DHCJamba on real images and draws how it did.

Default: scikit-learn's 1,797 handwritten digits, which come with it (no download).  The halves are not
shuffled: other people wrote the test half.  Its accuracy over seeds is what benchmarks/digits.py measures.

    python examples/image_classification.py [--dataset digits|cifar10|cifar100|mnist|FOLDER]

A FOLDER holds one folder of images a class.  Writes to --output: model.keras, learning_curve.png,
confusion_matrix.png, expert_usage.png, results.json.
"""

import argparse
import json
import time
from pathlib import Path

import keras
import matplotlib
from data import Augmented, load
from pictures import draw_confusion_matrix, draw_expert_usage, draw_learning_curve
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

import keras_jamba

matplotlib.use("Agg")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", help="digits, cifar10, cifar100, mnist or a folder")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--epochs", type=int, default=None, help="default: 60 for digits, else 30")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--drop-path", type=float, default=0.4, help="stochastic depth, the same in each layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--validation",
        action="store_true",
        help="choose a recipe: test on the last 20 %% of the training images instead",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/image_classification"))
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that all of it runs")
    return parser.parse_args()


def build(args, data, steps):
    height, width, channels = data.train_images.shape[1:]
    # About 16 tokens for an 8 x 8 image, 64 for a 32 x 32 one.
    downsample = 2 if min(height, width) < 16 else 4
    small = dict(d_model=16, num_layers=2, mamba_ratio=1) if args.smoke else {}
    model = keras_jamba.DHCJamba.from_preset(
        args.preset,
        num_classes=len(data.classes),
        image_shape=(height, width, channels),
        downsample=downsample,
        dropout=args.dropout,
        drop_path=args.drop_path,
        **small,
    )
    # The moving average of the weights is what `fit` leaves in the model.
    optimizer = keras_jamba.training.optimizer(
        model, steps, args.learning_rate, weight_decay=0.05, use_ema=True, ema_momentum=0.98
    )
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
        metrics=["accuracy"],
    )
    return model


def baselines(data):
    """Test accuracy of two classical classifiers on the pixels, in percent."""
    flat = [x.reshape(len(x), -1)[:5000] for x in (data.train_images, data.test_images)]
    labels = data.train_labels[:5000], data.test_labels[:5000]
    models = {"SVC": SVC(gamma=0.001 * 256, C=1.0), "kNN-3": KNeighborsClassifier(3)}
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
    labels = keras.utils.to_categorical(data.train_labels, len(data.classes))
    batches = Augmented(data.train_images, labels, args.batch_size, args.seed)
    model = build(args, data, epochs * len(batches))
    print(
        f"{len(data.train_images)} training images, {len(data.test_images)} test images, "
        f"{model.count_params():,} parameters, on {keras.backend.backend()}"
    )

    started = time.perf_counter()
    history = model.fit(batches, epochs=epochs)
    seconds = time.perf_counter() - started
    # Before `predict`: on JAX that frees arrays which the optimizer shares with the model after an average.
    args.output.mkdir(parents=True, exist_ok=True)
    model.save(args.output / "model.keras")
    logits = model.predict(data.test_images, verbose=0)
    predicted = logits.argmax(axis=-1)
    accuracy = 100 * float((predicted == data.test_labels).mean())

    draw_learning_curve(history.history, args.output / "learning_curve.png")
    draw_confusion_matrix(data, predicted, args.output / "confusion_matrix.png")
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
    print(f"{seconds:.0f} s of training. Model, pictures and results.json are in {args.output}")


if __name__ == "__main__":
    main()

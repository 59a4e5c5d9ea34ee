"""Trains on a folder of pictures and saves a model that takes uint8 pixels and returns class names.

    python examples/photo_folder.py [--folder PICTURES] [--size H W] [--epochs N] [--output runs/photo_folder] [--smoke]

PICTURES holds one folder of pictures per class. Without it the script writes scikit-learn's handwritten digits as PNG
files, and one file that is no picture. The saved model takes integers from 0 to 255, the values in picture files.
Pictures become grey and are stretched to H x W pixels, 8 x 8 by default. OUTPUT must not hold a model yet.
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from PIL import Image

import keras_jamba
from keras_jamba.training import ImageFolder


def write_digits(folder):
    """Writes digits and an unreadable file to one folder per class, and returns `folder`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image / 16 * 255).astype("uint8")).save(place / f"{i}.png")
    (folder / "zero" / "broken.png").write_bytes(b"no picture")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="one folder of pictures per class")
    parser.add_argument("--size", type=int, nargs=2, default=(8, 8), metavar=("H", "W"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/photo_folder"))
    parser.add_argument(
        "--smoke", action="store_true", help="a quarter of the pictures, once, to see that all of it runs"
    )
    args = parser.parse_args()
    if (args.output / "model").exists():
        parser.error(f"--output must be a folder without a model. Received: {args.output}. Pass another folder.")
    keras.utils.set_random_seed(0)
    folder = args.folder or write_digits(args.output / "pictures")
    given = dict(image_size=tuple(args.size), channels=1, batch_size=32, skip_unreadable=True)
    train = ImageFolder(folder, **given, split=(0, 0.2 if args.smoke else 0.8))
    test = ImageFolder(folder, **given, split=(0.8, 1), shuffle=False, drop_last=False)
    unreadable = [*train.unreadable, *test.unreadable]
    print(f"{len(train.class_names)} classes; left out {len(unreadable)} unreadable file(s)")

    # The sizes of a preset with random weights. Labels are indices into the class names.
    given = dict(num_classes=len(train.class_names), class_names=train.class_names, image_shape=(*args.size, 1))
    model = keras_jamba.DHCJamba.from_preset("digits", load_weights=False, **given)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss, metrics=["accuracy"])
    model.fit(train, epochs=1 if args.smoke else args.epochs, verbose=2)
    accuracy = model.evaluate(test, verbose=0, return_dict=True)["accuracy"]
    print(f"{accuracy:.1%} of the test pictures are right")

    # The same weights with a division by 255 before them, in one file.
    model.save_to_preset(args.output / "model")
    server = keras_jamba.DHCJamba.from_preset(args.output / "model", pixel_range=(0, 255))
    server.save(args.output / "model.keras")
    loaded = keras.models.load_model(args.output / "model.keras")
    pixels, labels = test[0]
    answers = loaded.decode_predictions(loaded.predict(np.round(pixels * 255).astype("uint8"), verbose=0), top=2)
    for answer, label in list(zip(answers, labels, strict=True))[:3]:
        print(", ".join(f"{name} {probability:.0%}" for name, probability in answer), "- is", test.class_names[label])


if __name__ == "__main__":
    main()

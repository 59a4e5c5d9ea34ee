"""Image data sets of the examples."""

from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np


@dataclass
class Images:
    """Float images `(count, H, W, C)` from 0 to 1 and integer labels `(count,)`."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list

    def first(self, count):
        """Returns the first `count` images of each split."""
        arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return Images(*(x[:count] for x in arrays), self.classes)

    def validation_split(self, share):
        """Returns the data with the last `share` of the training images as test images."""
        cut = round(len(self.train_images) * (1 - share))
        x, y = self.train_images, self.train_labels
        return Images(x[:cut], y[:cut], x[cut:], y[cut:], self.classes)


def load(name):
    """Returns the data set `name`: a known name, or a folder with one folder of images per class."""
    if name == "digits":
        return _digits()
    if name in ("cifar10", "cifar100", "mnist"):
        (x, y), (x_test, y_test) = getattr(keras.datasets, name).load_data()
        classes = [str(i) for i in range(int(y.max()) + 1)]
        return Images(_scaled(x), y.reshape(-1), _scaled(x_test), y_test.reshape(-1), classes)
    if Path(name).is_dir():
        return _folder(Path(name))
    raise SystemExit(
        "--dataset must be digits, cifar10, cifar100, mnist or an existing folder. "
        f"Received: {name!r}. Check the spelling or the path."
    )


def _digits():
    """Returns unshuffled halves, since different people wrote the two halves."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images / 16).astype("float32")[..., None], digits.target
    return Images(x[:898], y[:898], x[898:], y[898:], [str(i) for i in range(10)])


def _scaled(images):
    images = images.astype("float32") / 255
    return images[..., None] if images.ndim == 3 else images


def _folder(folder, size=32):
    """Returns the images of a folder. Every fifth image of a class is a test image."""
    from PIL import Image

    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise SystemExit(
            "A folder of images must hold one folder per class and at least two classes. "
            f"Received: {str(folder)!r} with {len(classes)}. Sort the images into folders."
        )
    splits = {False: ([], []), True: ([], [])}  # whether for testing
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in _SUFFIXES)
        for i, file in enumerate(files):
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB").resize((size, size)))
            images, labels = splits[i % 5 == 4]
            images.append(pixels)
            labels.append(label)
    arrays = [(_scaled(np.stack(x)), np.array(y)) for x, y in (splits[False], splits[True])]
    return Images(*arrays[0], *arrays[1], classes)


_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")

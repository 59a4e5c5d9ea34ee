"""Images for the examples: data sets, and batches augmented alike on every backend."""

import math
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from scipy import ndimage


@dataclass
class Images:
    """Float images `(count, H, W, C)` from 0 to 1 and integer labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list

    def first(self, count):
        arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return Images(*(x[:count] for x in arrays), self.classes)

    def validation_split(self, share):
        """The last `share` of the training images in the place of the test images."""
        cut = round(len(self.train_images) * (1 - share))
        x, y = self.train_images, self.train_labels
        return Images(x[:cut], y[:cut], x[cut:], y[cut:], self.classes)


def load(name):
    """A data set by name, or a folder with one folder of images a class."""
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
    """Unshuffled halves: the writers of the second are not those of the first."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images / 16).astype("float32")[..., None], digits.target
    return Images(x[:898], y[:898], x[898:], y[898:], [str(i) for i in range(10)])


def _scaled(images):
    images = images.astype("float32") / 255
    return images[..., None] if images.ndim == 3 else images


def _folder(folder, size=32):
    """Every fifth image of a class is for testing."""
    from PIL import Image

    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise SystemExit(
            "A folder of images must hold one folder a class, two or more. "
            f"Received: {str(folder)!r} with {len(classes)}. Sort the images into folders."
        )
    parts = {False: ([], []), True: ([], [])}
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in _SUFFIXES)
        for i, file in enumerate(files):
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB").resize((size, size)))
            images, labels = parts[i % 5 == 4]
            images.append(pixels)
            labels.append(label)
    arrays = [(_scaled(np.stack(x)), np.array(y)) for x, y in (parts[False], parts[True])]
    return Images(*arrays[0], *arrays[1], classes)


_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


class Augmented(keras.utils.PyDataset):
    """Shuffled batches of images slightly turned, sheared, scaled, shifted, made paler or darker, and mixed.

    Mixed: an image and its label keep at least half of their weight, the rest is the next one's
    (MixUp, Zhang et al. 2018). Order and augmentation are a function of the seed, the epoch and the
    batch alone, and made in NumPy: every backend trains on the very same batches.
    """

    def __init__(
        self,
        images,
        labels,
        batch_size,
        seed,
        rotation=20.0,
        shear=0.1,
        zoom=0.15,
        shift=0.1,
        gamma=0.2,
        mix=0.5,
    ):
        super().__init__()
        self.images, self.labels = images, labels
        self.batch_size, self.seed = batch_size, seed
        self.rotation, self.shear, self.zoom, self.shift = rotation, shear, zoom, shift
        self.gamma, self.mix = gamma, mix
        self.epoch = 0

    def __len__(self):
        # Whole batches only: one shape, one compilation.
        return max(1, len(self.images) // self.batch_size)

    def on_epoch_end(self):
        self.epoch += 1

    def __getitem__(self, index):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.images))
        chosen = order[index * self.batch_size :][: self.batch_size]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        images = np.stack([self._moved(self.images[i], rng) for i in chosen])
        share = 1 - self.mix * rng.uniform(size=(len(chosen), 1)).astype("float32")
        return _mixed(images, share[..., None, None]), _mixed(self.labels[chosen], share)

    def _moved(self, image, rng):
        angle = np.deg2rad(rng.uniform(-self.rotation, self.rotation))
        scale = rng.uniform(1 - self.zoom, 1 + self.zoom, size=2)
        height, width = image.shape[:2]
        shift = rng.uniform(-self.shift, self.shift, size=2) * (height, width)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn @ [[1, 0], [rng.uniform(-self.shear, self.shear), 1]] / scale
        centre = (np.array([height, width]) - 1) / 2
        offset = centre - matrix @ (centre + shift)
        planes = [ndimage.affine_transform(image[..., c], matrix, offset, order=1) for c in range(image.shape[-1])]
        power = math.exp(rng.uniform(-self.gamma, self.gamma))
        return np.stack(planes, axis=-1).clip(0, 1) ** power


def _mixed(x, share):
    return share * x + (1 - share) * np.roll(x, -1, axis=0)

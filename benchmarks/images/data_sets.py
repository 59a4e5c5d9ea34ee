"""CIFAR-10 (JPEG 75) and Fashion-MNIST, read from a folder on this machine. Nothing is downloaded.

The environment variable KERAS_JAMBA_DATA, or `--data` of a benchmark, names the folder. It holds:

    cifar10_jpeg.npz     CIFAR-10, re-compressed as JPEG of quality 75 by a third party
    fashion-mnist/       the four files `train-images-idx3-ubyte.gz` and so on, as their authors publish them

Debian's package `dataset-fashion-mnist` and https://github.com/zalandoresearch/fashion-mnist have the files of
Fashion-MNIST. `cifar10_jpeg.npz` has the arrays that `_jpeg_images` describes. Any tool that writes JPEG makes it from
the images of https://www.cs.toronto.edu/~kriz/cifar.html; other artefacts give other accuracies.
"""

import gzip
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VARIABLE = "KERAS_JAMBA_DATA"
VALIDATION = 5000
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class DataSet:
    """Images `(n, h, w, c)` uint8 and labels `(n,)` int64 of two splits, and the names of the classes."""

    train: tuple
    test: tuple
    class_names: tuple

    def validation_split(self):
        """Returns `(train, validation)`: all but the last 5,000 training images, and these. The order is shuffled."""
        images, labels = self.train
        return (images[:-VALIDATION], labels[:-VALIDATION]), (images[-VALIDATION:], labels[-VALIDATION:])


def load(name, folder=None):
    """Returns the `DataSet` "cifar10" or "fashion" of a folder, by default that of KERAS_JAMBA_DATA.

    Raises:
        FileNotFoundError: if no folder is named, or a file is missing.
        ValueError: for another name.
    """
    folder = os.environ.get(VARIABLE) if folder is None else folder
    if folder is None:
        raise FileNotFoundError(
            f"The data sets must be in a folder on this machine. Received: no folder. Pass --data FOLDER or set "
            f"{VARIABLE}; benchmarks/images/data_sets.py lists the files."
        )
    if name not in READERS:
        raise ValueError(f"The data set must be one of {list(READERS)}. Received: {name!r}. Pass one of them.")
    return READERS[name](Path(folder))


def _existing(file):
    if not file.is_file():
        raise FileNotFoundError(
            f"The data set must be on this machine. Received: {str(file)!r}, which does not exist. "
            "benchmarks/images/data_sets.py says where to get it."
        )
    return file


def _cifar10(folder):
    with np.load(_existing(folder / "cifar10_jpeg.npz")) as archive:
        arrays = dict(archive)
    return DataSet(*(_jpeg_images(arrays, split) for split in ("train", "test")), tuple(map(str, arrays["classes"])))


def _jpeg_images(arrays, split):
    """Returns images and labels of a split.

    All files share `header` (uint8). `SPLIT_bytes` (uint8) holds the rest of all files, one after the other,
    `SPLIT_lengths` (uint16) their lengths, and `SPLIT_labels` (uint8) the labels.
    """
    from PIL import Image

    header, ends = arrays["header"].tobytes(), np.cumsum(arrays[f"{split}_lengths"].astype("int64"))
    content = arrays[f"{split}_bytes"].tobytes()
    images = np.empty((len(ends), 32, 32, 3), "uint8")
    for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        images[i] = Image.open(io.BytesIO(header + content[start:end]))
    return images, arrays[f"{split}_labels"].astype("int64")


def _fashion(folder):
    folder = folder / "fashion-mnist"
    splits = [
        (_idx(folder / f"{name}-images-idx3-ubyte.gz")[..., None], _idx(folder / f"{name}-labels-idx1-ubyte.gz"))
        for name in ("train", "t10k")
    ]
    return DataSet(*((images, labels.astype("int64")) for images, labels in splits), _FASHION)


def _idx(file):
    """Returns the array of an idx file of bytes: two zeros, the code 8, the number of axes, their sizes, the values."""
    content = gzip.decompress(_existing(file).read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"An idx file must hold unsigned bytes. Received: {str(file)!r}. Download it again.")
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, 4)
    return np.frombuffer(content, "uint8", offset=4 + 4 * axes).reshape(shape)


READERS = {"cifar10": _cifar10, "fashion": _fashion}

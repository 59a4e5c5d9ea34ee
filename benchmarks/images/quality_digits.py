"""Digits for `benchmarks.images.quality`: protocols, trainings, corruptions."""

import functools
import time
from dataclasses import replace

import keras
import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from keras_jamba import _backend
from keras_jamba.training import recipes

CLASSICAL = {
    "SVC, gamma=scale, C=10": lambda: SVC(gamma="scale", C=10),
    "SVC, gamma=.001, C=10": lambda: SVC(gamma=0.001 * 256, C=10),
    "kNN-1": lambda: KNeighborsClassifier(1),
    "kNN-3": lambda: KNeighborsClassifier(3),
}
FOLDS = 5


@functools.cache
def digits():
    data = load_digits()
    return (data.images / 16).astype("float32")[..., None], data.target


def split(protocol, seed, salt=0):
    """Returns `(training images, labels, test images, labels)`.

    - D1: a random stratified split by seed, 80 % for training and 20 % for tests.
    - D2: both halves in the order of the file. Other people wrote the second half.
    - "fold i": the i-th fifth of the first half of D2, for selection. It has no test image of D2.
    """
    x, y = digits()
    if protocol.startswith("D1"):
        splitter = StratifiedShuffleSplit(1, test_size=0.2, random_state=seed + 1000 * salt)
        train, test = next(splitter.split(x, y))
    elif protocol.startswith("D2"):
        train, test = np.arange(898), np.arange(898, len(x))
    else:
        folds = np.array_split(np.arange(898), FOLDS)
        test = folds.pop(int(protocol.split()[-1]))
        train = np.concatenate(folds)[:718]  # equal sizes in all folds
    return x[train], y[train], x[test], y[test]


def recipe_of(protocol, epochs):
    recipe = replace(recipes.DIGITS, epochs=epochs)
    return replace(recipe, augmentation=None) if "without" in protocol else recipe


def trained(make, recipe, data, seeds):
    """Yields `(index, model, seconds)` for each pair of data and seed. On a GPU one program trains all."""
    if _on_gpu():
        from benchmarks.images import replicas

        started = time.perf_counter()
        model, weights = replicas.train(make, recipe, data, seeds)
        seconds = (time.perf_counter() - started) / len(seeds)
        for index, values in enumerate(weights):
            model.set_weights(values)
            yield index, model, seconds
        return
    for index, ((images, labels), seed) in enumerate(zip(data, seeds, strict=True)):
        keras.utils.set_random_seed(seed)
        model = make()
        started = time.perf_counter()
        recipe.fit(model, images, labels, seed=seed, verbose=0)
        yield index, model, time.perf_counter() - started


def _on_gpu():
    return _backend.tensors.platform() == "gpu" and keras.backend.backend() == "jax"


def accuracy(model, images, labels):
    """Returns `(percent, mean negative log-likelihood at the best of a few temperatures)`."""
    logits = model.predict(images, batch_size=len(images), verbose=0).astype("float64")
    right = 100 * float((logits.argmax(-1) == labels).mean())
    losses = []
    for scale in (1, 1.5, 2, 3, 4, 6):
        scaled = scale * logits
        scaled -= scaled.max(-1, keepdims=True)
        log_p = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
        losses.append(-log_p[np.arange(len(labels)), labels].mean())
    return right, float(min(losses))


def corruptions(images, seed, scale=1):
    """Returns `{name: images}`, random by seed. Occlusions and translations of 8 x 8 images are multiplied by scale."""
    rng = np.random.default_rng(seed)
    corrupted = {}
    for deviation in (0.1, 0.2, 0.3):
        noise = rng.normal(0, deviation, images.shape)
        corrupted[f"noise {deviation}"] = np.clip(images + noise, 0, 1)
    for sigma in (0.5, 0.75, 1.0):
        corrupted[f"blur {sigma}"] = ndimage.gaussian_filter(images, (0, sigma, sigma, 0))
    for side in (2 * scale, 3 * scale, 4 * scale):
        corrupted[f"occlusion {side}x{side}"] = _occluded(images, side, rng)
    for pixels in (scale, 2 * scale):
        corrupted[f"translation {pixels}"] = _translated(images, pixels, rng)
    return {name: x.astype("float32") for name, x in corrupted.items()}


def _occluded(images, side, rng):
    images = images.copy()
    corners = rng.integers(0, images.shape[1] - side + 1, (len(images), 2))
    for image, (row, column) in zip(images, corners, strict=True):
        image[row : row + side, column : column + side] = 0
    return images


def _translated(images, pixels, rng):
    """Shifts each image by `pixels` to one of the four sides, with zeros as padding."""
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    steps = pixels * np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])[rng.integers(0, 4, len(images))] + pixels
    size = images.shape[1]
    return np.stack([image[i : i + size, j : j + size] for image, (i, j) in zip(padded, steps, strict=True)])

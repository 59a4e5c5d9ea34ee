"""The benchmark of CIFAR-10 reads the data set where Keras keeps it, downloads nothing, and runs to its end."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
from checks import full, once

ROOT = Path(__file__).parent.parent
FOLDER = Path("datasets", "cifar-10-batches-py-target", "cifar-10-batches-py")
FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def cifar10(keras_home, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.images.cifar10", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ
        | {"KERAS_HOME": str(keras_home), "KERAS_BACKEND": keras.backend.backend(), "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def write_data(keras_home, names, images=8):
    """Random images in the format of the data set's files."""
    rng = np.random.default_rng(0)
    (keras_home / FOLDER).mkdir(parents=True)
    for name in names:
        pixels = rng.integers(0, 256, (images, 3 * 32 * 32), "uint8")
        content = {b"data": pixels, b"labels": rng.integers(0, 10, images).tolist()}
        (keras_home / FOLDER / name).write_bytes(pickle.dumps(content, protocol=4))


@once
def test_cifar10_without_the_data_set_says_how_to_get_it_and_writes_nothing(tmp_path):
    done = cifar10(tmp_path, "small")
    assert done.returncode == 1
    assert "CIFAR-10 must be on disk" in done.stderr and f"Received: {tmp_path / FOLDER} without" in done.stderr
    assert "keras.datasets.cifar10.load_data()" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@once
def test_cifar10_names_the_file_that_is_missing(tmp_path):
    write_data(tmp_path, FILES[:-1])
    done = cifar10(tmp_path, "small")
    assert done.returncode == 1 and "without test_batch." in done.stderr


@full()
@once
def test_cifar10_trains_and_records(tmp_path):
    write_data(tmp_path, FILES)
    arguments = ("small", "--smoke", "--epochs", 1, "--batch-size", 8, "--seed", 3, "--output", tmp_path)
    done = cifar10(tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / f"cifar10_small_{keras.backend.backend()}.json").read_text())
    assert (results["training images"], results["test images"]) == (40, 8)
    assert (results["epochs"], results["batch size"], results["seed"]) == (1, 8, 3)
    assert 0 <= results["test accuracy"] <= 100 and np.isfinite(results["last epoch"]["loss"])
    assert f"{results['test accuracy']:.2f} % of 8 test images right" in done.stdout

"""The benchmarks read image data sets from a folder, and say what is missing."""

import gzip
import io

import numpy as np
import pytest
from checks import once
from PIL import Image

from benchmarks.images import data_sets

# Independent of the backend.
pytestmark = once
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), "uint8").repeat(4, 1).repeat(4, 2)


def jpeg(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=75)
    return stream.getvalue()


def write_cifar10(folder):
    """Writes three images per split; all files share the bytes before the scan."""
    files = [jpeg(pixels) for pixels in PIXELS]
    header = files[0][: files[0].index(b"\xff\xda")]
    assert all(file.startswith(header) for file in files)
    bodies = [np.frombuffer(file[len(header) :], "uint8") for file in files]
    arrays = {"header": np.frombuffer(header, "uint8"), "classes": np.array(["cat", "dog"])}
    for split in ("train", "test"):
        arrays[f"{split}_bytes"] = np.concatenate(bodies)
        arrays[f"{split}_lengths"] = np.array([len(body) for body in bodies], "uint16")
        arrays[f"{split}_labels"] = np.array([0, 1, 1], "uint8")
    np.savez(folder / "cifar10_jpeg.npz", **arrays)
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def idx(x):
    return gzip.compress(bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">i4").tobytes() + x.tobytes())


def write_fashion(folder):
    (folder / "fashion-mnist").mkdir()
    images, labels = np.arange(2 * 28 * 28).astype("uint8").reshape(2, 28, 28), np.array([9, 0], "uint8")
    for name in ("train", "t10k"):
        (folder / "fashion-mnist" / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / "fashion-mnist" / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return images, labels


def test_images_of_the_jpeg_archive_are_those_of_single_files(tmp_path):
    expected = write_cifar10(tmp_path)
    found = data_sets.load("cifar10", tmp_path)
    for images, labels in (found.train, found.test):
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, [0, 1, 1])
    assert found.class_names == ("cat", "dog")


def test_fashion_mnist_is_read_from_its_idx_files(tmp_path, monkeypatch):
    images, labels = write_fashion(tmp_path)
    monkeypatch.setenv(data_sets.VARIABLE, str(tmp_path))
    found = data_sets.load("fashion")
    np.testing.assert_array_equal(found.test[0], images[..., None])
    np.testing.assert_array_equal(found.train[1], labels)
    assert len(found.class_names) == 10


def test_the_last_training_images_are_the_validation_split():
    images, labels = np.arange(6000)[:, None], np.arange(6000)
    train, validation = data_sets.DataSet((images, labels), None, ()).validation_split()
    assert train[1].tolist() == list(range(1000)) and validation[0][:, 0].tolist() == list(range(1000, 6000))


@pytest.mark.parametrize("name", ["cifar10", "fashion"])
def test_a_missing_file_is_named_with_its_source(tmp_path, monkeypatch, name):
    with pytest.raises(FileNotFoundError, match="must be on this machine. Received: .*data_sets.py says where"):
        data_sets.load(name, tmp_path)
    monkeypatch.delenv(data_sets.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match="Received: no folder. Pass --data FOLDER or set KERAS_JAMBA_DATA"):
        data_sets.load(name)


def test_an_unknown_name_and_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be one of .*Received: 'mnist'"):
        data_sets.load("mnist", tmp_path)
    write_fashion(tmp_path)
    (tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x0d\x01" + bytes(8)))
    with pytest.raises(ValueError, match="must hold unsigned bytes. Received: .*train-images"):
        data_sets.load("fashion", tmp_path)

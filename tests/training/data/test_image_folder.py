"""ImageFolder: pictures, clips, unreadable files, and augmentation that depends on seed and step only."""

import logging
import shutil
import sys

import keras
import numpy as np
import pytest
from checks import full
from PIL import Image

import keras_jamba
from keras_jamba.training.data import ImageFolder

SIZE = (8, 6)


def picture(value, size=SIZE, channels=3):
    pixels = np.random.default_rng(value).integers(0, 256, (*size, channels), "uint8")
    return Image.fromarray(pixels.squeeze())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(("cat", "dog", "emu")):
        (folder / name).mkdir()
        for i in range(4):
            picture(10 * label + i).save(folder / name / f"{i}.png")
        (folder / name / "notes.txt").write_text("no picture")
    (folder / ".hidden").mkdir()
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name in ("left", "right"):
        (folder / name / "folder").mkdir(parents=True)
        for i in range(12):
            Image.new("L", (6, 8), 20 * i).save(folder / name / "folder" / f"frame_{i}.png")
        frames = [Image.new("L", (6, 8), 20 * i) for i in range(12)]
        frames[0].save(folder / name / "moving.gif", save_all=True, append_images=frames[1:])
    return folder


def layers():
    return [
        keras.layers.RandomFlip("horizontal_and_vertical"),
        keras.layers.RandomRotation(0.2),
        keras.layers.RandomBrightness(0.4, value_range=(0, 1)),
    ]


def test_pictures_are_labelled_by_their_folder(pictures):
    folder = ImageFolder(pictures, SIZE, 12, shuffle=False)
    pixels, labels = folder.batch(0)
    assert folder.class_names == ("cat", "dog", "emu")
    np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], 4))
    assert (pixels.dtype, labels.dtype, pixels.shape) == ("float32", "int32", (12, *SIZE, 3))
    np.testing.assert_allclose(pixels[5], np.asarray(picture(11)) / 255, atol=1e-6)
    grey, _ = ImageFolder(pictures, (4, 5), 12, channels=1).batch(0)
    assert grey.shape == (12, 4, 5, 1) and 0 <= grey.min() < grey.max() <= 1


def test_splits_share_no_picture_and_miss_none(pictures):
    splits = [ImageFolder(pictures, SIZE, n, split=split) for n, split in ((9, (0, 0.75)), (3, (0.75, 1)))]
    pixels = np.concatenate([folder.batch(0)[0] for folder in splits])
    assert len(np.unique(pixels.reshape(12, -1), axis=0)) == 12
    np.testing.assert_array_equal(np.sort(splits[1].batch(0)[1]), [0, 1, 2])


@pytest.mark.parametrize("name", ["folder", "moving.gif"])
def test_frames_of_a_clip_are_sampled_evenly(clips, name):
    folder = ImageFolder(clips, SIZE, 4, channels=1, frames=4, shuffle=False)
    pixels, labels = folder.batch(0)
    assert pixels.shape == (4, 4, *SIZE, 1)
    np.testing.assert_array_equal(labels, [0, 0, 1, 1])
    row = 0 if name == "folder" else 1
    # Frame 10 comes after frame 9, not after frame 1.
    np.testing.assert_allclose(pixels[row, :, 0, 0, 0] * 255, [20, 80, 140, 200], atol=2)
    more, _ = ImageFolder(clips, SIZE, 4, channels=1, frames=24, shuffle=False).batch(0)
    np.testing.assert_allclose(more[row, :, 0, 0, 0] * 255, np.repeat(20 * np.arange(12), 2), atol=2)


@full("jax")
def test_augmentation_is_a_function_of_seed_and_step(pictures):
    one = ImageFolder(pictures, SIZE, 4, seed=3, augmentation=layers())
    other = ImageFolder(pictures, SIZE, 4, seed=3, augmentation=keras.Sequential(layers()), workers=2)
    plain = ImageFolder(pictures, SIZE, 4, seed=3)
    expected = [one.batch(step)[0] for step in range(6)]
    for step in (5, 0, 3):
        np.testing.assert_allclose(one.batch(step)[0], expected[step])
        assert not np.allclose(plain.batch(step)[0], expected[step])
    for step, (pixels, _) in enumerate(other):
        np.testing.assert_allclose(pixels, expected[step], atol=1e-6)
    assert not np.allclose(ImageFolder(pictures, SIZE, 4, seed=4, augmentation=layers()).batch(0)[0], expected[0])
    # Each picture of a batch is augmented differently.
    brightness = [keras.layers.RandomBrightness(0.4, value_range=(0, 1))]
    changes = ImageFolder(pictures, SIZE, 4, seed=3, augmentation=brightness).batch(0)[0] - plain.batch(0)[0]
    assert len(np.unique(np.round(np.median(changes, axis=(1, 2, 3)), 4))) == 4


@full("jax")
# Keras' own RandAugment transposes a scalar on PyTorch.
@pytest.mark.filterwarnings("ignore:.*Tensor.T is deprecated on 0-D tensors")
@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.RandomRotation(0.4),
        lambda: keras.layers.RandomColorJitter(value_range=(0, 1), brightness_factor=0.4, hue_factor=0.4),
        lambda: keras.layers.RandAugment(value_range=(0, 1), num_ops=1),
        lambda: keras.layers.RandomErasing(factor=1.0, value_range=(0, 1)),
    ],
    ids=["turned", "coloured", "several", "erased"],
)
def test_all_frames_of_a_clip_are_changed_alike(tmp_path, layer):
    for label in "ab":
        (tmp_path / label / "clip").mkdir(parents=True)
        for i in range(3):
            picture(ord(label)).save(tmp_path / label / "clip" / f"{i}.png")
    plain, _ = ImageFolder(tmp_path, SIZE, 2, frames=3).batch(0)
    changed, _ = ImageFolder(tmp_path, SIZE, 2, frames=3, augmentation=layer()).batch(0)
    assert changed.shape == plain.shape and not np.allclose(changed, plain)
    for frame in (1, 2):
        np.testing.assert_allclose(changed[:, frame], changed[:, 0], atol=1e-6)


def test_labels_are_mixed_with_the_pictures(pictures):
    plain, labels = ImageFolder(pictures, SIZE, 4, seed=3).batch(1)
    folder = ImageFolder(pictures, SIZE, 4, seed=3, augmentation=keras.layers.MixUp(alpha=1.0))
    mixed, shares = folder.batch(1)
    assert (shares.shape, shares.dtype, labels.shape) == ((4, 3), "float32", (4,))
    np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed.mean(axis=0), plain.mean(axis=0), atol=0.5)
    assert not np.allclose(mixed, plain) and set(np.nonzero(shares)[1]) <= set(labels)


def test_a_transform_comes_after_the_augmentation(pictures):
    inverted = ImageFolder(pictures, SIZE, 4, augmentation=layers(), transform=lambda batch, rng: (1 - batch[0], 0))
    expected = ImageFolder(pictures, SIZE, 4, augmentation=layers())
    np.testing.assert_allclose(inverted.batch(2)[0], 1 - expected.batch(2)[0], atol=1e-6)


@full("jax", "tensorflow")
def test_a_model_is_trained_on_a_folder(pictures):
    model = keras_jamba.DHCJamba(3, (*SIZE, 3), d_model=4, num_layers=1, mamba_ratio=None, d_ff=4, d_state=2)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    start = model.get_weights()
    weights = []
    for workers in (1, 2):
        model.set_weights(start)
        folder = ImageFolder(pictures, SIZE, 4, augmentation=layers(), workers=workers)
        model.fit(folder, epochs=2, verbose=0)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "torn.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"pillow reads.*torn\.png.*UnidentifiedImageError"):
        ImageFolder(tmp_path, SIZE, 1).batch(0)
    picture(0, (64, 64)).save(tmp_path / "a" / "torn.png")
    content = (tmp_path / "a" / "torn.png").read_bytes()
    (tmp_path / "a" / "torn.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"pillow reads.*torn\.png.*Replace or remove the file"):
        ImageFolder(tmp_path, SIZE, 1).batch(0)
    Image.fromarray(np.full((4, 4), 60000, "uint16")).save(tmp_path / "a" / "torn.png")
    with pytest.raises(ValueError, match=r"torn\.png.*mode I"):
        ImageFolder(tmp_path, SIZE, 1).batch(0)


def test_unreadable_files_are_skipped_counted_and_named(tmp_path, caplog):
    for name in "ab":
        (tmp_path / "all" / name).mkdir(parents=True)
        for i in range(4):
            picture(10 * ord(name) + i).save(tmp_path / "all" / name / f"{i}.png")
    shutil.copytree(tmp_path / "all", tmp_path / "readable")
    torn = [tmp_path / "all" / "a" / "1b.png", tmp_path / "all" / "b" / "9.jpg"]
    torn[0].write_bytes((tmp_path / "all" / "a" / "0.png").read_bytes()[:60])
    torn[1].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1b\.png.*skip_unreadable=True"):
        ImageFolder(tmp_path / "all", SIZE, 10, shuffle=False).batch(0)
    with caplog.at_level(logging.WARNING):
        folder = ImageFolder(tmp_path / "all", SIZE, 3, seed=5, skip_unreadable=True)
    (record,) = caplog.records
    assert "2 of 10 files cannot be read" in record.getMessage()
    assert folder.unreadable == tuple(torn) and all(str(path) in record.getMessage() for path in torn)
    # Batches equal those of the readable files, also with several workers and after resuming.
    expected = ImageFolder(tmp_path / "readable", SIZE, 3, seed=5)
    assert (folder.num_examples, len(folder)) == (expected.num_examples, len(expected)) == (8, 2)
    resumed = ImageFolder(tmp_path / "all", SIZE, 3, seed=5, skip_unreadable=True, workers=2)
    resumed.begin_epoch(1, 1)
    for found, step in ((folder.batch(3), 3), (folder.batch(0), 0), (resumed[0], 3)):
        for a, b in zip(found, expected.batch(step), strict=True):
            np.testing.assert_array_equal(a, b)
    caplog.clear()
    assert ImageFolder(tmp_path / "readable", SIZE, 3, skip_unreadable=True).unreadable == () and not caplog.records
    # Each split leaves out its own unreadable files. Splits share no file.
    splits = [ImageFolder(tmp_path / "all", SIZE, 1, split=s, skip_unreadable=True) for s in ((0, 0.6), (0.6, 1))]
    assert sorted(splits[0].unreadable + splits[1].unreadable) == torn
    assert sum(folder.num_examples for folder in splits) == 8
    for i in range(4):
        (tmp_path / "all" / "b" / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="file that can be read. Received: class 'b' with none.*pillow reads"):
        ImageFolder(tmp_path / "all", SIZE, 1, skip_unreadable=True)


def test_a_clip_with_an_unreadable_frame_is_skipped(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "clips")
    torn = tmp_path / "clips" / "left" / "folder" / "frame_1.png"
    torn.write_bytes(b"no picture")
    folder = ImageFolder(tmp_path / "clips", SIZE, 1, frames=4, shuffle=False, skip_unreadable=True)
    assert folder.unreadable == (torn.parent,) and folder.num_examples == 3
    np.testing.assert_array_equal([folder.batch(step)[1][0] for step in range(3)], [0, 1, 1])


def test_without_pillow_the_error_says_what_to_install(monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-jamba\[images\]'"):
        ImageFolder(pictures, SIZE, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_size": 8}, r"image_size must be \(h, w\).*8"),
        ({"image_size": (8, 0)}, "width of image_size must be an integer.*0"),
        ({"channels": 4}, r"channels must be one of \[1, 3\].*4"),
        ({"frames": 2}, "a clip.*cat"),
        ({"split": (0.5, 0.2)}, r"split must be.*\(0.5, 0.2\)"),
        ({"split": (0, 0.01)}, "widen split"),
        ({"folder": "nowhere"}, "folder must be a folder.*nowhere"),
        ({"augmentation": abs}, "must be a Keras layer.*abs"),
        ({"augmentation": [keras.layers.AugMix()]}, "AugMix; it draws from Python's global"),
        ({"batch_size": 13}, "12 examples, batch_size=13"),
    ],
)
def test_errors_give_the_rule_what_was_received_and_the_remedy(pictures, arguments, message):
    given = {"folder": pictures, "image_size": SIZE, "batch_size": 1} | arguments
    if "frames" in arguments:
        given["folder"] = pictures.parent / "flat"
        (given["folder"] / "cat").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match=message):
        ImageFolder(**given)

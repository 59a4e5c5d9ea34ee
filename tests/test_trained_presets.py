"""Presets with weights reach their stated accuracy on every backend, and their bodies learn other tasks."""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from checks import close, full, jitted, numpy
from sklearn.datasets import load_digits

import keras_jamba

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from video_tasks import TASKS  # noqa: E402


def digits():
    data = load_digits()
    return (data.images / 16).astype("float32")[..., None], data.target


def accuracy(model, inputs, labels):
    """Returns the accuracy in percent."""
    return 100 * (model.predict(inputs, batch_size=500, verbose=0).argmax(-1) == labels).mean()


@full("jax")
def test_digits_of_unseen_writers_are_classified():
    model = keras_jamba.DHCJamba.from_preset("digits")
    images, labels = digits()
    assert model.count_params() <= 300_000
    assert accuracy(model, images[898:], labels[898:]) >= 98.5


@full("jax", "tensorflow")
@pytest.mark.parametrize("name, least", [("direction", 99.5), ("order", 99.0), ("match", 97.0)])
def test_clips_are_classified(name, least):
    model = keras_jamba.DHCJamba.from_preset(f"video_{name}")
    clips, labels = TASKS[name].clips("test", 1000, seed=7)
    assert accuracy(model, clips, labels) >= least


@full("jax", "tensorflow")
def test_longer_clips_are_classified_and_streams_end_with_their_logits():
    model = keras_jamba.DHCJamba.from_preset("video_match")
    clips, labels = TASKS["match"].clips("test", 500, seed=7, frames=64)
    assert accuracy(model, clips, labels) >= 95
    step, cache = jitted(model.step), model.init_cache(4, max_frames=64)
    for t in range(64):
        logits, cache = step(clips[:4, t], cache)
    close(logits, numpy(jitted(model)(clips[:4])), absolute=1e-4)


@full("jax")
def test_another_number_of_classes_keeps_the_body_and_resets_the_head(caplog):
    trained = keras_jamba.DHCJamba.from_preset("digits")
    other = keras_jamba.DHCJamba.from_preset("digits", num_classes=3)
    assert "not made for num_classes=3: the head starts from random weights" in caplog.text
    for mine, theirs in zip(other.weights, trained.weights, strict=True):
        if not mine.path.startswith("head"):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (mine, theirs)))
    assert other.head.kernel.shape == (48, 3)
    with pytest.raises(ValueError, match="weights of a preset must fit.*Received"):
        keras_jamba.DHCJamba.from_preset("digits", num_classes=3, d_model=32)


@full("jax", "tensorflow")
def test_a_frozen_body_is_unchanged_while_a_new_head_learns():
    model = keras_jamba.DHCJamba.from_preset("digits", num_classes=2, dropout=0.0, drop_path=0.0)
    model.encoder.trainable = model.backbone.trainable = False
    assert [v.path for v in model.trainable_variables] == ["head/kernel", "head/bias"]
    model.compile(keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    images, labels = digits()
    before = [np.array(numpy(v.value)) for v in (*model.encoder.weights, *model.backbone.weights)]
    model.fit(images[:320], labels[:320] % 2, batch_size=32, epochs=3, verbose=0)
    after = [numpy(v.value) for v in (*model.encoder.weights, *model.backbone.weights)]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert accuracy(model, images[898:], labels[898:] % 2) >= 95


@full("jax", "tensorflow")
def test_the_body_classifies_images_of_other_sizes():
    images, labels = digits()
    model = keras_jamba.DHCJamba.from_preset("digits", image_shape=(None, None, 1))
    np.testing.assert_allclose(
        model.predict(images[898:908], verbose=0),
        keras_jamba.DHCJamba.from_preset("digits").predict(images[898:908], verbose=0),
        atol=1e-5,
    )
    framed = np.pad(images[898:], ((0, 0), (0, 2), (2, 0), (0, 0)))
    assert accuracy(model, framed, labels[898:]) >= 85

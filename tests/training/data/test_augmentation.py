"""Augmentation by Keras layers, a pure function of a batch and a generator. MixUp and CutMix are included."""

import random
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from checks import full

from keras_jamba.training.data import Augmentation, Batches

CLASSES = 3


def images(count=6, frames=None, channels=3):
    shape = (count, 8, 6, channels) if frames is None else (count, frames, 8, 6, channels)
    return np.random.default_rng(0).random(shape, "float32")


def labels(count=6):
    return np.arange(count) % CLASSES


def rng(seed=0):
    return np.random.default_rng(seed)


def several():
    return [
        keras.layers.RandomFlip(),
        keras.layers.RandomRotation(0.2),
        keras.layers.RandomErasing(value_range=(0, 1)),
        keras.layers.MixUp(alpha=1.0),
        keras.layers.RandomBrightness(0.4, value_range=(0, 1)),
        keras.layers.CutMix(),
    ]


def one_hot(integers):
    return np.eye(CLASSES, dtype="float32")[integers]


@full("jax")
def test_an_augmented_batch_depends_on_the_generator_only():
    one, other = (Augmentation(several(), CLASSES) for _ in range(2))
    expected = one((images(), labels()), rng())
    keras.utils.set_random_seed(7)
    one((images(), labels()), rng(1))
    for augmentation in (one, other):
        for a, b in zip(augmentation((images(), labels()), rng()), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    different = one((images(), labels()), rng(1))
    assert not np.allclose(different[0], expected[0]) and not np.allclose(different[1], expected[1])


@full("jax")
def test_the_global_generators_stay_unchanged():
    augmentation = Augmentation(several(), CLASSES)
    drawn = []
    for calls in (0, 1, 2):
        keras.utils.set_random_seed(3)
        for _ in range(calls):
            augmentation((images(), labels()), rng())
        # The first call builds layers, which draws from Python's generator.
        drawn.append((np.random.random(), float(keras.random.uniform(())), random.random() if calls != 1 else None))
    assert drawn[0] == drawn[2] and drawn[0][:2] == drawn[1][:2]


@full("jax")
def test_a_batch_is_a_function_of_its_step():
    def batches(**arguments):
        return Batches((images(), labels()), 3, transform=Augmentation(several(), CLASSES), **arguments)

    one = batches(seed=1)
    expected = [one.batch(step) for step in range(4)]
    for step in (3, 0, 2):
        np.testing.assert_array_equal(one.batch(step)[0], expected[step][0])
    for step, batch in enumerate(batches(seed=1, workers=2)):
        np.testing.assert_array_equal(batch[0], expected[step][0])
        np.testing.assert_array_equal(batch[1], expected[step][1])
    assert not np.allclose(batches(seed=2).batch(0)[0], expected[0][0])


@full("jax", "tensorflow")
def test_several_threads_get_the_batches_of_one_thread():
    layers = several()
    expected = [Augmentation(layers, CLASSES)((images(), labels()), rng(seed))[0] for seed in range(8)]
    shared = [Augmentation(layers, CLASSES) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda seed: shared[seed % 2]((images(), labels()), rng(seed))[0], range(8))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@full("jax")
def test_compiled_layers_give_their_eager_outputs():
    layer = keras.layers.RandomRotation(0.2)
    augmented = Augmentation(layer)(images(), rng(5))
    seed = rng(5).integers(2**31 - 1)
    layer.generator.state.assign(np.array([seed, 0], layer.generator.state.dtype))
    expected = keras.ops.convert_to_numpy(layer(images(), training=True))
    np.testing.assert_allclose(augmented, expected, atol=1e-5)


def test_layers_that_change_nothing_give_the_identity():
    layers = [keras.layers.RandomZoom(0.0), keras.layers.RandomRotation(0.0), keras.layers.ZeroPadding2D(0)]
    x, y = Augmentation(layers)((images(), labels()), rng())
    np.testing.assert_allclose(x, images(), atol=1e-5)
    np.testing.assert_array_equal(y, labels())
    np.testing.assert_array_equal(Augmentation([])(images(), rng()), images())


def test_padding_and_cropping_shift_a_batch():
    x = images()
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = [padded[:, i : i + 8, j : j + 6] for i in range(5) for j in range(5)]
    augmentation = Augmentation([keras.layers.ZeroPadding2D(2), keras.layers.RandomCrop(8, 6)])
    found = set()
    for seed in range(6):
        shifted = augmentation(x, rng(seed))
        found |= {place for place, window in enumerate(windows) if np.allclose(shifted, window, atol=1e-6)}
    assert len(found) > 2


@pytest.mark.parametrize("given", ["integers", "floats"])
def test_mix_up_mixes_images_and_labels_by_the_same_share(given):
    # All labels differ, so a mixed label identifies its sources.
    x, y = images(CLASSES), labels(CLASSES)
    augmentation = Augmentation(keras.layers.MixUp(alpha=1.0), CLASSES if given == "integers" else None)
    mixed = 0
    for seed in range(4):
        z, shares = augmentation((x, y if given == "integers" else one_hot(y)), rng(seed))
        assert (z.dtype, shares.dtype, shares.shape) == ("float32", "float32", (CLASSES, CLASSES))
        np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=1e-6)
        np.testing.assert_allclose(z, np.einsum("ij,jhwc->ihwc", shares, x), atol=1e-5)
        assert all(np.count_nonzero(row) <= 2 for row in shares)
        mixed += np.sum((shares > 0.01) & (shares < 0.99))
    assert mixed


def test_cut_mix_pastes_a_rectangle_and_its_share_of_the_label():
    x = labels(CLASSES)[:, None, None, None] * np.ones((1, 8, 6, 1), "float32")
    augmentation = Augmentation(keras.layers.CutMix(), CLASSES)
    pasted = 0
    for seed in range(8):
        z, shares = augmentation((x, labels(CLASSES)), rng(seed))
        areas = np.stack([(z[..., 0] == label).mean(axis=(1, 2)) for label in range(CLASSES)], axis=-1)
        np.testing.assert_allclose(shares, areas, atol=1e-6)
        for image, label in zip(z[..., 0], labels(CLASSES), strict=True):
            rows, columns = np.nonzero(image != label)
            if len(rows):
                assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
                pasted += 0 < len(rows) < image.size
    assert pasted


def test_mix_up_shares_follow_a_beta_distribution():
    count, alpha = 1024, 0.4
    y = np.eye(count, dtype="float32")
    _, shares = Augmentation(keras.layers.MixUp(alpha=alpha))((np.zeros((count, 1, 1, 1), "float32"), y), rng())
    np.testing.assert_allclose(np.diag(shares).mean(), 0.5, atol=0.04)
    np.testing.assert_allclose(np.diag(shares).var(), 1 / (4 * (2 * alpha + 1)), atol=0.01)


@pytest.mark.parametrize("layer", [keras.layers.MixUp, keras.layers.CutMix, lambda: keras.layers.RandomRotation(0.3)])
def test_all_frames_of_a_clip_are_changed_alike(layer):
    still = np.repeat(images()[:, None], 3, axis=1)
    clips, y = Augmentation(layer(), CLASSES)((still, labels()), rng())
    pictures, expected = Augmentation(layer(), CLASSES)((images(), labels()), rng())
    assert clips.shape == still.shape and not np.allclose(clips, still)
    for frame in range(3):
        np.testing.assert_allclose(clips[:, frame], pictures, atol=1e-6)
    np.testing.assert_array_equal(y, expected)


def test_the_order_of_frames_is_kept():
    x = images(frames=4)
    mixed, shares = Augmentation(keras.layers.MixUp(alpha=1.0), 6)((x, np.arange(6)), rng())
    np.testing.assert_allclose(mixed, np.einsum("ij,jthwc->ithwc", shares, x), atol=1e-5)


def test_the_structure_of_a_batch_is_kept():
    augmentation = Augmentation(keras.layers.RandomFlip())
    weight = np.linspace(0, 1, 6)
    batch = augmentation((images(), labels(), weight), rng())
    np.testing.assert_array_equal(batch[1], labels())
    np.testing.assert_array_equal(batch[2], weight)
    alone = augmentation(images(), rng())
    np.testing.assert_array_equal(alone, batch[0])
    (only,) = augmentation((images(),), rng())
    np.testing.assert_array_equal(only, alone)
    np.testing.assert_array_equal(Augmentation(keras.layers.MixUp())((images(),), rng())[0].shape, images().shape)


@full("jax")
def test_nested_layers_are_flattened():
    expected, _ = Augmentation(several(), CLASSES)((images(), labels()), rng())
    for nested in (keras.Sequential(several()), keras.layers.Pipeline(several()), Augmentation(several())):
        found, _ = Augmentation(nested, CLASSES)((images(), labels()), rng())
        np.testing.assert_array_equal(found, expected)


def test_a_layer_that_branches_on_values_runs_eagerly():
    class Branching(keras.layers.Layer):
        def call(self, x):
            return x + 1 if float(keras.ops.sum(x)) > 0 else x

    np.testing.assert_allclose(Augmentation(Branching())(images(), rng()), images() + 1)


class Unseeded(keras.layers.Layer):
    def call(self, x):
        return x + keras.random.uniform(())


class Mixing(keras.layers.MixUp):
    pass


@pytest.mark.parametrize(
    "layers, batch, message",
    [
        ([abs], images(), "must be a Keras layer.*abs"),
        ([keras.layers.AugMix()], images(), "AugMix; it draws from Python's global"),
        ([Mixing()], images(), "Mixing; .*keras.layers.MixUp or CutMix themselves"),
        ([Unseeded()], images(), "Unseeded.*Keras' global generator.*SeedGenerator"),
        ([keras.layers.MixUp()], (images(), labels()), "num_classes=None.*Augmentation"),
        ([keras.layers.CutMix()], (images(), labels(), labels()), "sample_weight. Leave it out"),
        ([keras.layers.RandomFlip()], images()[0], r"b, h, w, c.*\(8, 6, 3\).*channels"),
        ([keras.layers.RandomFlip()], images().astype("uint8"), "floats from 0 to 1.*uint8.*divide pixels by 255"),
    ],
)
def test_errors_give_the_rule_what_was_received_and_the_remedy(layers, batch, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(layers)(batch, rng())


@pytest.mark.parametrize(
    "y, message",
    [(labels() + 1, "from 1 to 3, num_classes=3"), (labels()[:, None], r"integers of shape \(b,\).*\(6, 1\)")],
)
def test_labels_are_checked_before_they_are_mixed(y, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(keras.layers.MixUp(), CLASSES)((images(), y), rng())

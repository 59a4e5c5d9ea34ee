"""RandomAffine, compared with SciPy's transformation and with the definition of each amount."""

import keras
import numpy as np
import pytest
from checks import full, numpy
from scipy import ndimage

from keras_jamba.training import Augmentation, RandomAffine

IMAGES = np.random.default_rng(0).random((4, 9, 7, 2), "float32")
IMAGES[:, [0, -1]] = IMAGES[:, :, [0, -1]] = 0


@full("jax")
def test_each_image_equals_its_transformation_by_scipy():
    layer = RandomAffine(rotation=20.0, zoom=0.2, shear=0.3, translation=0.1)
    transforms = []
    original = layer._transforms

    def recorded(*size):
        result = original(*size)
        transforms.append(np.array(numpy(result)))  # on PyTorch Keras changes its argument in place
        return result

    layer._transforms = recorded
    outputs = numpy(layer(IMAGES, training=True))
    for image, output, transform in zip(IMAGES, outputs, transforms[0], strict=True):
        (a, b, c), (d, e, f) = transform[:6].reshape(2, 3)
        # SciPy's axes are rows and columns.
        matrix, offset = np.array([[e, d], [b, a]]), np.array([f, c])
        for channel in range(2):
            expected = ndimage.affine_transform(image[..., channel], matrix, offset, order=1, mode="grid-constant")
            np.testing.assert_allclose(output[..., channel], expected, atol=1e-5)
    assert np.abs(transforms[0][0] - transforms[0][1]).max() > 1e-3


def moved_by(**amounts):
    """Returns the linear parts and the offsets of the centre of 2000 transforms."""
    transforms = numpy(RandomAffine(seed=1, **amounts)._transforms(2000, 9, 7)).astype("float64")
    linear = transforms[:, [0, 1, 3, 4]].reshape(-1, 2, 2)
    offsets = transforms[:, [2, 5]] + linear @ np.array([3.0, 4.0]) - np.array([3.0, 4.0])
    return linear, offsets


def test_a_rotation_keeps_lengths_and_its_bound():
    linear, offsets = moved_by(rotation=15.0)
    np.testing.assert_allclose(linear @ linear.transpose(0, 2, 1), np.tile(np.eye(2), (2000, 1, 1)), atol=1e-6)
    angles = np.degrees(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert 14.5 < np.abs(angles).max() <= 15 and abs(angles.mean()) < 1
    np.testing.assert_allclose(offsets, 0, atol=1e-5)


def test_zoom_shear_and_translation_keep_their_bounds():
    linear, _ = moved_by(zoom=0.1)
    scales = 1 / linear[:, [0, 1], [0, 1]]
    assert scales.min() >= 0.9 - 1e-6 and scales.max() <= 1.1 + 1e-6 and scales.std(axis=0).min() > 0.05
    linear, _ = moved_by(shear=0.2)
    assert 0.19 < np.abs(linear[:, 0, 1]).max() <= 0.2 + 1e-6
    np.testing.assert_allclose(linear[:, [0, 1, 1], [0, 0, 1]], np.tile([1.0, 0.0, 1.0], (2000, 1)), atol=1e-6)
    linear, offsets = moved_by(translation=0.5)
    assert (np.abs(offsets) <= np.array([3.5, 4.5]) + 1e-5).all() and np.abs(offsets).max(axis=0).min() > 3.4


def test_nothing_changes_without_amounts_or_outside_of_training():
    np.testing.assert_allclose(numpy(RandomAffine()(IMAGES, training=True)), IMAGES, atol=1e-6)
    np.testing.assert_array_equal(numpy(RandomAffine(rotation=20.0)(IMAGES)), IMAGES)


def test_the_layer_is_serialisable_and_works_in_an_augmentation():
    layer = RandomAffine(rotation=20.0, zoom=0.1, shear=0.2, translation=0.1, seed=3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert again.get_config() == layer.get_config()
    augmentation = Augmentation([layer])
    first, second = (augmentation(IMAGES, np.random.default_rng(0)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - augmentation(IMAGES, np.random.default_rng(1))).max() > 0.01


@pytest.mark.parametrize("amounts", [{"rotation": -1.0}, {"zoom": 1.0}, {"shear": "a little"}])
def test_bad_amounts_are_refused(amounts):
    with pytest.raises(ValueError, match=f"{next(iter(amounts))} must be a number.*Received"):
        RandomAffine(**amounts)

"""PhotoAugmentation against the crops, rectangles and labels that its arguments allow."""

import numpy as np
import pytest
from checks import once

from keras_jamba.training.data import PhotoAugmentation

# NumPy alone computes the augmentation.
pytestmark = once


def photos(count=40, frames=None):
    """Returns images whose pixels all differ, uint8, and their labels."""
    shape = (count, 8, 12, 3) if frames is None else (count, frames, 8, 12, 3)
    images = np.random.default_rng(1).integers(1, 256, shape).astype("uint8")
    return images, np.arange(count) % 4


def augmented(images, labels, seed=0, **arguments):
    before = images.copy()
    found = PhotoAugmentation(num_classes=4, **arguments)((images, labels), np.random.default_rng(seed))
    np.testing.assert_array_equal(images, before)
    assert found[0].dtype == images.dtype and found[0].shape == images.shape
    return found


def crops(image, most):
    """Returns all shifts of an image by up to `most` rows and columns, and their mirror images."""
    height, width, _ = image.shape
    padded = np.pad(image, ((most[0],) * 2, (most[1],) * 2, (0, 0)))
    found = [padded[i : i + height, j : j + width] for i in range(2 * most[0] + 1) for j in range(2 * most[1] + 1)]
    return found, [crop[:, ::-1] for crop in found]


def test_each_image_is_one_of_its_shifts_or_their_mirror_images():
    images, labels = photos()
    found, same = augmented(images, labels, shift=0.25)
    np.testing.assert_array_equal(same, labels)
    chosen = []
    for image, result in zip(images, found, strict=True):
        plain, mirrored = crops(image, (2, 3))
        places = [i for i, crop in enumerate(plain + mirrored) if np.array_equal(crop, result)]
        assert len(places) == 1
        chosen += places
    assert 10 < sum(place >= len(plain) for place in chosen) < 30
    assert len(set(chosen)) > 25


def test_without_arguments_that_move_nothing_moves():
    images, labels = photos()
    for dtype in ("uint8", "int64", "float32", "float16"):
        given = images.astype(dtype)
        np.testing.assert_array_equal(augmented(given, labels, shift=0, mirror=False)[0], given)


def test_erasing_fills_one_rectangle_of_the_chosen_images_with_a_colour_of_the_image():
    images, labels = photos(200)
    found, _ = augmented(images, labels, shift=0, mirror=False, erasing=0.5)
    changed = [np.nonzero((a != b).any(axis=-1)) for a, b in zip(images, found, strict=True)]
    erased = [i for i, (rows, _) in enumerate(changed) if len(rows)]
    assert 70 < len(erased) < 130
    for i in erased:
        rows, columns = changed[i]
        inside = found[i, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].reshape(-1, 3)
        assert (inside == inside[0]).all()
        assert (images[i].reshape(-1, 3) == inside[0]).all(axis=1).any()
        # Sizes round to whole pixels, and only a pixel with the colour itself does not change.
        assert 1 <= len(inside) <= 0.33 * 96 * 1.5


@pytest.mark.parametrize("one_hot", [False, True])
def test_cut_mix_labels_an_image_by_the_shares_of_its_pixels(one_hot):
    labels = np.arange(100) % 4
    images = np.broadcast_to(labels.astype("uint8")[:, None, None, None], (100, 8, 12, 3)).copy()
    given = np.eye(4, dtype="float32")[labels] if one_hot else labels
    found, mixed = augmented(images, given, cut_mix=0.5, shift=0, mirror=False)
    assert mixed.dtype == np.float32
    shares = np.stack([(found[..., 0] == label).mean(axis=(1, 2)) for label in range(4)], axis=1)
    np.testing.assert_allclose(mixed, shares, atol=1e-6)
    assert 20 < (mixed.max(axis=1) < 1).sum() < 60


def test_cut_mix_takes_pixels_of_the_other_image_at_the_same_place():
    images, labels = photos()
    found, _ = augmented(images, labels, cut_mix=1.0, shift=0, mirror=False)
    same = (found[:, None] == images[None]).all(axis=-1)
    assert same.any(axis=1).all()
    for i, each in enumerate(same):
        others = [j for j in range(len(images)) if j != i and (each[j] & ~each[i]).any()]
        explained = each[i] | each[max(others, key=lambda j, each=each: each[j].sum())] if others else each[i]
        assert explained.all()


def test_frames_of_a_clip_change_alike():
    images, labels = photos(20)
    arguments = dict(shift=0.25, cut_mix=0.5, erasing=0.0)
    alone, mixed = augmented(images, labels, **arguments)
    clips = np.stack([images, 255 - images, images], axis=1)
    together, also_mixed = augmented(clips, labels, **arguments)
    np.testing.assert_array_equal(together[:, 0], alone)
    np.testing.assert_array_equal(together[:, 2], alone)
    np.testing.assert_array_equal(also_mixed, mixed)
    seen = together[:, 0] > 0
    np.testing.assert_array_equal(together[:, 1][seen], 255 - alone[seen])


def test_the_result_depends_on_the_generator_alone():
    images, labels = photos()
    arguments = dict(shift=0.25, cut_mix=0.5, erasing=0.5)
    first, again, other = (augmented(images, labels, seed, **arguments) for seed in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[0] != other[0]).any()


def test_images_alone_and_weights_stay_what_they_are():
    images, labels = photos()
    transform = PhotoAugmentation()
    alone = transform(images, np.random.default_rng(0))
    weights = np.arange(40.0)
    found = transform((images, labels, weights), np.random.default_rng(0))
    np.testing.assert_array_equal(found[0], alone)
    assert found[1] is labels and found[2] is weights


@pytest.mark.parametrize(
    "arguments, batch, message",
    [
        ({"shift": -0.1}, None, "shift must be a number from 0 to 1. Received"),
        ({"cut_mix": 2}, None, "cut_mix must be a number from 0 to 1. Received"),
        ({}, (np.zeros((2, 8, 8)), None), r"Images must be a NumPy array.*Received: ndarray of shape \(2, 8, 8\)"),
        ({}, (np.zeros((2, 8, 8, 3), "bool"), None), "of floats or integers.*Received.*bool"),
        ({}, (np.zeros((2, 0, 8, 3)), None), r"without empty axes. Received: ndarray of shape \(2, 0, 8, 3\)"),
        ({"mirror": 0.3}, None, "mirror must be True or False. Received: mirror=0.3"),
        ({"cut_mix": 1, "num_classes": 2}, (np.zeros((2, 8, 8, 3)), np.zeros(4, int)), r"Received: 2 images, .*\(4,\)"),
        ({"cut_mix": 1}, (np.zeros((2, 8, 8, 3)),), "cut_mix needs labels. Received: a batch of images alone"),
        ({"cut_mix": 1}, (np.zeros((2, 8, 8, 3)), np.zeros(2, int)), "need float labels.*num_classes=None"),
        ({"cut_mix": 1}, (np.zeros((2, 8, 8, 3)), np.zeros(2, int), np.ones(2)), "Received: a batch with a sample"),
        ({"cut_mix": 1, "num_classes": 2}, (np.zeros((2, 8, 8, 3)), np.zeros((2, 3))), "labels of shape \\(2, 3\\)"),
        ({"cut_mix": 1, "num_classes": 2}, (np.zeros((2, 8, 8, 3)), np.array([0, 2])), "num_classes - 1. Received"),
    ],
)
def test_other_arguments_and_batches_are_refused(arguments, batch, message):
    with pytest.raises(ValueError, match=message):
        PhotoAugmentation(**arguments)(batch, np.random.default_rng(0))

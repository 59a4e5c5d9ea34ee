"""Clips of the video tasks match their labels, and their controls reveal no more than stated."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import once
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from video_tasks import (  # noqa: E402
    CONTROLS,
    DIRECTIONS,
    NOISE,
    ORDERS,
    SPLITS,
    TASKS,
    frame_mean,
    generator,
    only_last,
    shuffled_frames,
    sprites,
)

# Independent of the backend.
pytestmark = once
DIGESTS = {
    "direction": "32b0a2fdb9d60c0f",
    "order": "a61bde2ecc2ffee4",
    "match": "cfbbc02cb5c3ddad",
}


def hashes(arrays):
    return {hashlib.sha256(np.ascontiguousarray(x)).hexdigest() for x in arrays}


def digest(clips, labels):
    return hashlib.sha256(clips.tobytes() + labels.tobytes()).hexdigest()[:16]


def without_noise(x):
    return np.maximum(x - np.float32(NOISE), 0)


def shown(frames, split):
    """Returns the sprite of a split in each of `frames (N, h, w)`, and the squared distance of its nearest window."""
    images = without_noise(sprites(split)[0]).reshape(-1, 64)
    windows = np.lib.stride_tricks.sliding_window_view(without_noise(frames), (8, 8), axis=(1, 2))
    windows = windows.reshape(-1, 64)
    square = windows @ (-2 * images.T)
    square += (windows**2).sum(1, keepdims=True)
    square += (images**2).sum(1)
    nearest = square.reshape(len(frames), -1, len(images)).min(axis=1)
    return nearest.argmin(axis=1), nearest.min(axis=1)


def read_direction(clips):
    """Returns the labels, read from the motion between the centres of mass of the first and last frames."""
    mass = clips[..., 0] / clips[..., 0].sum((2, 3), keepdims=True)
    rows, columns = np.arange(clips.shape[2])[:, None], np.arange(clips.shape[3])
    centres = np.stack([(mass * rows).sum((2, 3)), (mass * columns).sum((2, 3))], axis=-1)
    motion = np.sign(np.round(centres[:, -1] - centres[:, 0]))
    return (motion[:, None] * DIRECTIONS / np.linalg.norm(DIRECTIONS, axis=1)[:, None]).sum(-1).argmax(1)


def read_order(clips, split="test"):
    """Returns the labels, read from the digits in the three frames that are brighter than noise."""
    bright = (clips > NOISE).any((2, 3, 4))
    assert (bright.sum(1) == 3).all()
    rows, distance = shown(clips[bright][..., 0], split)
    assert distance.max() < 1e-3
    orders = sprites(split)[1][rows].reshape(-1, 3)
    return (orders[:, None] == ORDERS).all(-1).argmax(1)


def read_match(clips, split="test"):
    """Returns the labels, and the rows `(N, 2)` of the digits in the first and last frames."""
    rows, distance = shown(clips[:, [0, -1]].reshape(-1, *clips.shape[2:4]), split)
    assert distance.max() < 1e-3
    rows = rows.reshape(-1, 2)
    classes = sprites(split)[1][rows]
    return (classes[:, 0] == classes[:, 1]).astype(int), rows


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_clips_are_equal_on_every_machine(task):
    clips, labels = task.clips("test", 16, seed=1, salt=2)
    assert clips.shape == (16, task.frames, *task.size, 1) and clips.dtype == np.float32
    assert labels.shape == (16,) and labels.dtype == np.int32
    assert 0 <= clips.min() and clips.max() <= 1
    assert digest(clips, labels) == DIGESTS[task.name]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_any_other_split_seed_or_salt_gives_other_clips(task):
    one = hashes(task.clips("train", 32)[0])
    assert one == hashes(task.clips("train", 32)[0])
    assert len(one) == 32
    for split, numbers in (("train", {"seed": 1}), ("train", {"salt": 1}), ("validation", {}), ("test", {})):
        assert not one & hashes(task.clips(split, 32, **numbers)[0])
    assert hashes(task.clips("train", 32, seed=1)[0]) != hashes(task.clips("train", 32, salt=1)[0])


def test_splits_share_no_sprite_and_omit_none():
    found = {split: hashes(sprites(split)[0]) for split in SPLITS}
    assert {split: len(digests) for split, digests in found.items()} == {"train": 1079, "validation": 359, "test": 359}
    assert len(set().union(*found.values())) == 1797


@pytest.mark.parametrize("split", SPLITS)
def test_clips_show_the_sprites_of_their_split_only(split):
    others = set(SPLITS) - {split}
    for name, frame in (("direction", 0), ("match", 0), ("match", -1)):
        frames = TASKS[name].clips(split, 16)[0][:, frame, ..., 0]
        assert shown(frames, split)[1].max() < 1e-3
        assert min(shown(frames, other)[1].min() for other in others) > 0.01
    clips = TASKS["order"].clips(split, 16)[0]
    frames = clips[(clips > NOISE).any((2, 3, 4))][..., 0]
    assert min(shown(frames, other)[1].min() for other in others) > 0.01


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_splits_share_no_clip(task):
    seen = [hashes(task.clips(split, 2000)[0]) for split in SPLITS]
    assert len(set().union(*seen)) == sum(map(len, seen))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_labels_are_balanced(task):
    assert np.ptp(np.bincount(task.clips("train", 4 * 6 * 20)[1], minlength=task.classes)) == 0
    assert np.ptp(np.bincount(task.clips("train", 502)[1], minlength=task.classes)) <= 1


def test_every_direction_has_its_exact_reversal():
    clips, labels = TASKS["direction"].clips("train", 400)
    assert np.array_equal(clips[::2, ::-1], clips[1::2])
    assert np.array_equal(DIRECTIONS[labels[::2]], -DIRECTIONS[labels[1::2]])
    # Equal to the last bit: otherwise the mean would reveal the direction.
    assert np.array_equal(frame_mean(clips[::2]), frame_mean(clips[1::2]))
    assert set(labels[::2]) == set(range(8))


@pytest.mark.parametrize("frames", [2, 7, 8])
def test_a_direction_is_the_motion_of_a_complete_digit(frames):
    clips, labels = TASKS["direction"].clips("test", 400, frames=frames)
    assert np.array_equal(read_direction(clips), labels)
    ink = clips.sum((2, 3, 4))
    assert np.array_equal(ink, np.repeat(ink[:, :1], frames, axis=1))


@pytest.mark.parametrize("frames", [3, 12, 30])
def test_an_order_is_the_order_of_three_flashes(frames):
    clips, labels = TASKS["order"].clips("test", 240, frames=frames)
    assert np.array_equal(read_order(clips), labels)


@pytest.mark.parametrize("frames", [2, 16, 64])
def test_a_match_shows_two_images_of_one_class(frames):
    clips, labels = TASKS["match"].clips("test", 300, frames=frames)
    read, rows = read_match(clips)
    assert np.array_equal(read, labels)
    assert (rows[:, 0] != rows[:, 1]).all()
    between = clips[:, 1:-1]
    if frames > 2:
        assert 0.045 < (between > NOISE).mean() < 0.055
        assert shown(between[:, 0, ..., 0], "test")[1].min() > 0.1


def test_matches_of_any_length_have_the_same_ends():
    short, labels = TASKS["match"].clips("test", 20)
    long, same_labels = TASKS["match"].clips("test", 20, frames=64)
    assert np.array_equal(short[:, [0, -1]], long[:, [0, -1]]) and np.array_equal(labels, same_labels)


def test_digits_are_as_frequent_in_matches_as_in_mismatches():
    clips, labels = TASKS["match"].clips("test", 2000, frames=2)
    classes = sprites("test")[1][read_match(clips)[1]]
    for end in (0, 1):
        counts = np.array([np.bincount(classes[labels == label, end], minlength=10) for label in (0, 1)])
        # The standard deviation of 1000 draws from ten classes is 9.5.
        assert np.abs(counts - 100).max() < 4 * 9.5


def test_controls_are_what_their_names_say():
    clips, _ = TASKS["order"].clips("test", 20)
    shuffled = shuffled_frames(clips, generator("control", "test"))
    assert all(hashes(a) == hashes(b) and not np.array_equal(a, b) for a, b in zip(shuffled, clips, strict=True))
    first = (shuffled[:, :1] == clips).all((2, 3, 4)).argmax(1)
    assert len(set(first)) > 5
    for frame in range(12):
        np.testing.assert_allclose(frame_mean(clips)[:, frame], sum(clips[:, t] for t in range(12)) / 12, atol=1e-6)
        assert np.array_equal(only_last(clips)[:, frame], clips[:, -1])


def test_exact_readers_of_controls_reach_their_ceiling():
    count = 600
    order, labels = TASKS["order"].clips("test", count)
    right = np.mean(read_order(shuffled_frames(order, generator("control", "test"))) == labels)
    assert abs(right - 1 / 6) < 3 * (1 / 6 * 5 / 6 / count) ** 0.5
    direction, labels = TASKS["direction"].clips("test", count)
    shuffled = shuffled_frames(direction, generator("control", "test"))
    axis = read_direction(np.stack([direction[:, 0], direction[:, -1]], axis=1)) % 4
    assert np.array_equal(axis, labels % 4)
    right = np.mean(read_direction(shuffled) == labels)
    assert abs(right - 1 / 2) < 3 * (1 / 4 / count) ** 0.5
    match, labels = TASKS["match"].clips("test", count)
    assert np.mean(read_match(only_last(match))[0] == labels) == 0.5


@pytest.mark.parametrize("name, control", [(name, control) for name in TASKS for control in TASKS[name].ceilings])
def test_no_classifier_of_a_control_passes_its_ceiling(name, control):
    task, count = TASKS[name], 1000
    (x, y), (x_test, y_test) = task.clips("train", count), task.clips("test", count)
    x, x_test = (CONTROLS[control](a, generator(control, split)) for a, split in ((x, "train"), (x_test, "test")))
    if control != "shuffled":
        x, x_test = x[:, :1], x_test[:, :1]
    ceiling = task.ceilings[control] / 100
    for classifier in (RidgeClassifier(10.0), KNeighborsClassifier(5)):
        right = np.mean(classifier.fit(x.reshape(count, -1), y).predict(x_test.reshape(count, -1)) == y_test)
        assert right < ceiling + 3 * (ceiling * (1 - ceiling) / count) ** 0.5


def test_the_same_classifiers_read_directions_from_ordered_frames():
    (x, y), (x_test, y_test) = (TASKS["direction"].clips(split, 800) for split in ("train", "test"))
    for classifier in (RidgeClassifier(10.0), KNeighborsClassifier(5)):
        assert np.mean(classifier.fit(x.reshape(800, -1), y).predict(x_test.reshape(800, -1)) == y_test) > 0.95


def test_invalid_arguments_of_clips_are_refused():
    with pytest.raises(ValueError, match="multiple of 2. Received: 7. Ask for 8"):
        TASKS["direction"].clips("train", 7)
    with pytest.raises(ValueError, match="2 to 8 frames. Received: frames=9"):
        TASKS["direction"].clips("train", 8, frames=9)
    with pytest.raises(ValueError, match="3 or more frames. Received: frames=2"):
        TASKS["order"].clips("train", 8, frames=2)
    with pytest.raises(ValueError, match="one of train, validation, test. Received: 'eval'"):
        TASKS["match"].clips("eval", 8)

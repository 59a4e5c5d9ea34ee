"""Damaged saves: a changed state is refused, an older one is passed over, and earlier formats are checked too."""

import json

import numpy as np
import pytest
from checks import once

from keras_jamba.training.checkpointing import _saves, _snapshots

# Files are read alike on every backend.
pytestmark = once


def written(folder, step, **state):
    """Writes a save with one array, and returns its folder."""
    state = {"variables": 1, "processes": 1, "run": 0} | state
    _snapshots.write(folder, step, [_snapshots.as_single_shard(np.arange(6, dtype="float32").reshape(2, 3))], state)
    return _snapshots.place_of(folder, step)


def test_every_changed_digit_of_the_state_is_refused(tmp_path):
    save = written(tmp_path, 3, epoch=12)
    text = (save / "state.json").read_text()
    places = [i for i, letter in enumerate(text) if letter.isdigit()]
    for i in places:
        (save / "state.json").write_text(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :])
        with pytest.raises(ValueError, match="Received: .*step_00000003"):
            _saves.last(tmp_path, 1)
    (save / "state.json").write_text(text)
    assert _saves.last(tmp_path, 1) == (3, 1) and len(places) > 50


def test_a_changed_format_does_not_disable_the_checksum(tmp_path):
    save = written(tmp_path, 3, epoch=12)
    state = json.loads((save / "state.json").read_text())
    (save / "state.json").write_text(json.dumps(state | {"format": 2, "epoch": 7}))
    with pytest.raises(ValueError, match="Received: .*step_00000003.*checksum"):
        _saves.last(tmp_path, 1)


def test_a_save_of_a_newer_version_is_an_error_that_says_so(tmp_path, caplog):
    written(tmp_path, 3)
    newer = written(tmp_path, 6)
    state = json.loads((newer / "state.json").read_text())
    (newer / "state.json").write_text(json.dumps(state | {"format": 4}))
    message = "format from 1 to 3.*Received: format 4 in .*step_00000006.*newer version.*Update keras-jamba"
    with pytest.raises(ValueError, match=message):
        _saves.last(tmp_path, 1)
    written(tmp_path, 9)
    assert _saves.last(tmp_path, 1) == (9, 1)
    assert "passes over the save of step 6" in caplog.text and "newer version" in caplog.text
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("number", [0, -1, True, None, "3", 3.0])
def test_a_format_that_is_no_number_is_refused(tmp_path, number):
    save = written(tmp_path, 3)
    state = json.loads((save / "state.json").read_text())
    (save / "state.json").write_text(json.dumps(state | {"format": number}))
    with pytest.raises(ValueError, match="Received: .*step_00000003.*valid format"):
        _saves.last(tmp_path, 1)


def test_a_damaged_older_save_is_passed_over_and_reported(tmp_path, caplog):
    older, _ = written(tmp_path, 3), written(tmp_path, 6)
    (older / "state.json").write_text("{")
    assert _saves.last(tmp_path, 1) == (6, 1)
    assert "passes over the save of step 3" in caplog.text and "step_00000003" in caplog.text
    (_snapshots.place_of(tmp_path, 6) / "state.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="must be as it was written. Received: .*step_00000006.*Remove this folder"):
        _saves.last(tmp_path, 1)


@pytest.mark.parametrize(
    "table",
    [
        [[[2, 3], [[[0, 0], [2, 3], "float32", 64]]]],
        [[[2, 3], [[[0, 0], [2, 3], "float32", -64]]]],
        [[[2, 3], [[[0, 0], [2, 4], "float32", 0]]]],
        [[[2, 3], [[[1, 0], [2, 3], "float32", 0]]]],
        [[[2, 3], [[[0, 0], [1, 3], "float32", 0], [[1, 0], [1, 3], "float32", 4]]]],
        [[[2, 3], [[[0, 0], [2, 3], "object", 0]]]],
        [[[2, 3], [[[0, 0], [2, 3], "float33", 0]]]],
        [[[2, 3], [[[0, 0], [2, 3], "float64", 32]]]],
        [[2, 3]],
        {"a": 1},
        None,
    ],
)
def test_a_table_of_arrays_that_does_not_fit_the_file_is_refused_in_older_formats(tmp_path, table):
    save = written(tmp_path, 3)
    state = json.loads((save / "state.json").read_text())
    del state["checksum"]
    (save / "state.json").write_text(json.dumps(state | {"format": 2, "arrays": table}))
    with pytest.raises(ValueError, match="must be as it was written. Received: .*step_00000003"):
        _saves.last(tmp_path, 1)


@pytest.mark.parametrize(
    "field", ["processes", "variables", "epoch", "step_in_epoch", "run", "stopped", "data", "python"]
)
@pytest.mark.parametrize("value", [-1, "1", 1.5, None])
def test_a_field_of_a_wrong_type_is_refused_in_older_formats(tmp_path, field, value):
    save = written(tmp_path, 3)
    state = json.loads((save / "state.json").read_text())
    del state["checksum"]
    (save / "state.json").write_text(json.dumps(state | {"format": 2, field: value}))
    with pytest.raises(ValueError, match=f"Received: .*step_00000003.* a wrong {field}"):
        _saves.last(tmp_path, 1)


def test_an_older_format_is_read_with_one_warning(tmp_path, caplog):
    save = written(tmp_path, 3)
    state = json.loads((save / "state.json").read_text())
    del state["checksum"]
    (save / "state.json").write_text(json.dumps(state | {"format": 2}))
    ((saved,), _, _) = _saves.read([tmp_path], 3, index=0)
    np.testing.assert_array_equal(saved.read(), np.arange(6).reshape(2, 3))
    assert caplog.text.count("without a checksum") == 1


@pytest.mark.parametrize("name", ["step_8", "step_\u00b2", "step_000000031", "step_-0000003", "step_00000003x"])
def test_other_folders_in_the_folder_of_the_saves_are_ignored(tmp_path, name):
    written(tmp_path, 3)
    (tmp_path / name).mkdir()
    (tmp_path / name / "state.json").write_text("{}")
    assert _snapshots.steps(tmp_path) == [3] and _saves.last(tmp_path, 1) == (3, 1)

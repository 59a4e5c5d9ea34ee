"""Damaged saves: a changed state is refused, an older one is passed over, and earlier formats are checked too.

A save that cannot be read, or a file in the place of the folder, is an error too.
"""

import builtins
import errno
import io
import json
import os
import shutil
from pathlib import Path

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


def deny(monkeypatch, place):
    """Makes a file, or a folder with all below it, unreadable: for root, who may run the tests, modes do not."""

    def denied(call):
        def checked(path=".", *args, **kwargs):
            if isinstance(path, str | Path) and Path(path).is_relative_to(place):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *args, **kwargs)

        return checked

    for module, name in ((os, "scandir"), (io, "open"), (builtins, "open")):
        monkeypatch.setattr(module, name, denied(getattr(module, name)))


def check_is_unreadable(read, place):
    with pytest.raises(PermissionError, match="Permission denied. .* Make this path readable.* or save into") as caught:
        read()
    assert caught.value.errno == errno.EACCES and Path(caught.value.filename).is_relative_to(place)
    assert "Remove" not in str(caught.value)


@pytest.mark.parametrize("name", [".", "step_00000003", "step_00000006", "step_00000006/state.json", "process_1"])
def test_a_save_that_cannot_be_read_is_an_error_that_names_it(tmp_path, monkeypatch, name):
    written(tmp_path, 3)
    written(tmp_path, 6)
    written(tmp_path / "process_1", 2)
    assert _saves.last(tmp_path, 1) == (6, 1)
    deny(monkeypatch, tmp_path / name)
    check_is_unreadable(lambda: _saves.last(tmp_path, 1), tmp_path / name)


def test_arrays_that_cannot_be_read_are_an_error_that_names_them(tmp_path, monkeypatch):
    arrays = written(tmp_path, 3) / "arrays.bin"
    deny(monkeypatch, arrays)
    check_is_unreadable(lambda: _saves.damaged([tmp_path], 3), arrays)
    check_is_unreadable(lambda: _saves.read([tmp_path], 3, index=0), arrays)
    size = Path.stat

    def denied(path, **given):
        if path == arrays:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return size(path, **given)

    monkeypatch.setattr(Path, "stat", denied)
    check_is_unreadable(lambda: _saves.last(tmp_path, 1), arrays)


def lose_the_state(save):
    (save / "state.json").unlink()


def lose_the_target_of_the_state(save):
    lose_the_state(save)
    (save / "state.json").symlink_to(save / "lost.json")


def lose_the_target_of_the_folder(save):
    shutil.rmtree(save)
    save.symlink_to(save.with_name("lost"))


@pytest.mark.parametrize("lose", [lose_the_state, lose_the_target_of_the_state, lose_the_target_of_the_folder])
def test_a_newest_save_without_its_state_is_damaged_and_an_older_one_passed_over(tmp_path, caplog, lose):
    written(tmp_path, 3)
    lose(written(tmp_path, 6))
    message = "must be as it was written. Received: .*step_00000006' with state.json that.*Remove this folder"
    with pytest.raises(ValueError, match=message):
        _saves.last(tmp_path, 1)
    written(tmp_path, 9)
    assert _saves.last(tmp_path, 1) == (9, 1)
    assert "passes over the save of step 6" in caplog.text and "step_00000006" in caplog.text


def test_a_save_of_two_processes_without_one_state_is_damaged_and_one_without_a_process_does_not_count(tmp_path):
    for place, step in ((0, 3), (1, 3), (0, 6)):
        written(tmp_path / f"process_{place}", step, processes=2)
    for name in (".unfinished-step_00000009-1-2", ".replaced-step_00000003"):
        (tmp_path / "process_1" / name).mkdir()
    assert _saves.last(tmp_path, 2) == (3, 2)
    lose_the_state(written(tmp_path / "process_1", 6, processes=2))
    with pytest.raises(ValueError, match="Received: .*process_1.step_00000006' with state.json.*Remove this folder"):
        _saves.last(tmp_path, 2)


@pytest.mark.parametrize("name", ["saves", "saves/a", "link", "link/a", "a"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, name):
    (tmp_path / "saves").write_text("a log")
    (tmp_path / "link").symlink_to(tmp_path / "lost")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "process_0").write_text("a log")
    (tmp_path / "a" / "process_log").write_text("is no folder of a process")
    message = "need a folder. Received: a (file|link to a lost folder, .*link'). Pass another folder"
    with pytest.raises(NotADirectoryError, match=message) as caught:
        _saves.last(tmp_path / name, 2)
    assert caught.value.errno == errno.ENOTDIR and Path(caught.value.filename).is_relative_to(tmp_path / name)
    assert _saves.last(tmp_path / "a", 1) is None and _saves.last(tmp_path / "new" / "b", 1) is None

"""Staging folders of the writers: flushing, locks, and the leftovers of killed processes."""

import os
import signal
import stat
from pathlib import Path

import pytest
from checks import once
from test_files import content

from keras_jamba import _files

# Independent of the backend; folders are locked where Python has fcntl.
pytestmark = once
pytest.importorskip("fcntl")


def test_leftovers_of_killed_processes_are_removed_by_name(tmp_path):
    for name in (".unfinished-a_1-x", ".replaced-a_2", ".unfinished-b", "a_3"):
        (tmp_path / name).mkdir()
    _files.remove_leftovers(tmp_path, "a_*")
    assert set(content(tmp_path)) == {".unfinished-b", "a_3"}
    _files.remove_folder(tmp_path / "a_3")
    assert set(content(tmp_path)) == {".unfinished-b"}


def test_the_next_write_removes_the_staging_folder_of_a_killed_process(tmp_path):
    reading, writing = os.pipe()
    process = os.fork()  # it uses neither Keras nor a backend, whose threads do not survive a fork
    if process == 0:
        try:
            with _files.atomic_folder(tmp_path / "a") as staged:
                (staged / "part").write_text("half")
                os.write(writing, b"staged")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 6) == b"staged"
        (left,) = tmp_path.iterdir()
        with _files.atomic_folder(tmp_path / "a") as staged:
            (staged / "part").write_text("new")
        # The process still writes there.
        assert left.exists() and (tmp_path / "a" / "part").read_text() == "new"
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        for pipe in (reading, writing):
            os.close(pipe)
    assert left.exists()
    with _files.atomic_folder(tmp_path / "a", replaces=True) as staged:
        (staged / "part").write_text("newer")
    assert content(tmp_path) == {"a": None, "a/part": b"newer"}


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def without_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", without_folders)
    with _files.atomic_folder(tmp_path / "folder") as staged:
        (staged / "part").write_text("x")
    with _files.atomic_file(tmp_path / "file") as staged:
        staged.write_text("x")
    assert content(tmp_path) == {"folder": None, "folder/part": b"x", "file": b"x"}


def test_everything_is_flushed_before_it_is_moved(tmp_path, monkeypatch):
    events, replace, fsync = [], os.replace, os.fsync
    path_of = lambda handle: os.readlink(f"/proc/self/fd/{handle}").rsplit("/", 1)[-1]  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(("flush", path_of(handle))), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("move", Path(b).name)), replace(a, b)))
    with _files.atomic_file(tmp_path / "file") as staged:
        staged.write_text("x")
    parent = ("flush", tmp_path.name)
    assert events == [("flush", "file"), ("move", "file"), parent]
    events.clear()
    with _files.atomic_folder(tmp_path / "folder") as staged:
        (staged / "part").write_text("x")
    assert events == [("flush", "part"), ("flush", "folder"), ("move", "folder"), parent]


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    # The user root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode == os.W_OK and Path(path).name == "file"))
    with pytest.raises(PermissionError, match="Permission denied: '.*file'"), _files.atomic_file(tmp_path / "file"):
        pass
    assert content(tmp_path) == {"file": b"precious"}


def test_a_new_folder_that_another_process_removes_is_made_again(tmp_path, monkeypatch):
    taken, flock = [], _files.fcntl.flock

    def first_taken(lock, operation):
        if not taken:
            taken.extend(tmp_path.glob(".unfinished-*"))
            taken[0].rmdir()
            raise BlockingIOError
        return flock(lock, operation)

    monkeypatch.setattr(_files.fcntl, "flock", first_taken)
    with _files.atomic_file(tmp_path / "file") as staged:
        staged.write_text("new")
    assert taken and content(tmp_path) == {"file": b"new"}

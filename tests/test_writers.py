"""Writers on a full disk, and killed writers. `tests/release` has more moments and faults of all formats."""

import os
import random
import signal
import time

import numpy as np
import pytest
import writers
from checks import once
from test_files import content, full_disk

from keras_jamba import _files
from keras_jamba.training.checkpointing import _saves, _snapshots

# Independent of the backend.
pytestmark = once
pytest.importorskip("fcntl")


@pytest.mark.parametrize("name", writers.WRITERS)
def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch, name):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    write, read = writers.WRITERS[name](tmp_path)
    write(1)
    largest = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    writers.make_way(name, tmp_path)
    before = content(tmp_path)
    with full_disk(largest // 2):
        if name in writers.SILENT:
            write(2)
        else:
            with pytest.raises(OSError, match="File too large") as caught:
                write(2)
            assert str(tmp_path) in str(caught.value) and "unfinished" not in str(caught.value)
    assert content(tmp_path) == before
    old = read()
    write(3)
    assert not writers.equal(read(), old) and writers.leftovers(tmp_path) == []


def snapshot(folder):
    arrays = lambda k: [_snapshots.as_single_shard(np.full(50_000, k + i, "float32")) for i in range(4)]  # noqa: E731

    def read():
        _snapshots.steps(folder)
        assert _saves.damaged([folder], 1) is None
        return [saved.read() for saved in _snapshots.read(folder, 1)[0]]

    return lambda k: _snapshots.write(folder, 1, arrays(k), {}), read


def one_file(folder):
    def write(k):
        with _files.atomic_file(folder / "file") as staged, open(staged, "wb") as stream:
            for _ in range(100):
                stream.write(bytes([k]) * 10_000)

    return write, lambda: [np.frombuffer((folder / "file").read_bytes(), "uint8")]


@pytest.mark.parametrize("writer", [snapshot, one_file, writers.plans])
def test_a_killed_writer_leaves_the_old_or_the_new_content(tmp_path, monkeypatch, writer):
    """Kills forks that use neither Keras nor a backend, whose threads do not survive a fork."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    write, read = writer(tmp_path)
    write(1)
    names, begin = set(content(tmp_path)), time.perf_counter()
    write(1)
    duration, draw = time.perf_counter() - begin, random.Random(0)
    old, killed = read(), 0
    for _ in range(4):
        process = os.fork()
        if process == 0:
            try:
                write(2)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, duration))
        os.kill(process, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(process, 0)[1])
        left = read()
        write(2)
        assert (writers.equal(left, old) or writers.equal(left, read())) and set(content(tmp_path)) == names
        write(1)
    assert killed

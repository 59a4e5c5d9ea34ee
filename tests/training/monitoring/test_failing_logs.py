"""Logs that cannot be written: the training continues, and rows are kept."""

import csv
import errno
import logging
import os

import keras
import numpy as np
import pytest
from checks import once
from small_training import batch

from keras_jamba import _backend, training
from keras_jamba.training.monitoring import _writers

# Independent of the backend.
pytestmark = once


class Hook(keras.callbacks.Callback):
    """Callback that calls a function before each step."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_train_batch_begin(self, batch, logs=None):
        self.function(batch)


def fit(*callbacks, steps=6):
    """Returns the steps that a training ran."""
    x, y = batch()
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    seen = []
    hook = Hook(seen.append)
    model.fit(np.tile(x, (steps, 1, 1, 1)), np.tile(y, steps), len(x), 1, 0, [hook, *callbacks], shuffle=False)
    return len(seen)


def monitor(**places):
    return training.Monitor([training.LearningRate()], every=1, **places)


def steps_in(file):
    with open(file, newline="", encoding="utf-8") as stream:
        return [int(row["step"]) for row in csv.DictReader(stream)]


def warnings_of(caplog, *words):
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [text for text in texts if all(word in text for word in words)]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00damaged", b"step,epoch\r\n" + b"\xff" * 9, b"x" * 200_000])
def test_a_damaged_file_is_renamed_and_a_new_one_is_written(tmp_path, caplog, content):
    file = tmp_path / "log.csv"
    file.write_bytes(content)
    assert fit(monitor(csv=file)) == 6
    assert steps_in(file) == [2, 3, 4, 5, 6]
    assert (tmp_path / "log.csv.damaged").read_bytes() == content
    assert len(warnings_of(caplog, str(file), "log.csv.damaged", "not CSV in UTF-8")) == 1
    file.write_bytes(content)
    fit(monitor(csv=file))
    assert (tmp_path / "log.csv.damaged-1").read_bytes() == content


def test_a_file_that_cannot_be_opened_is_replaced_by_one_beside_it(tmp_path, caplog):
    file = tmp_path / "log.csv"
    file.mkdir()
    assert fit(monitor(csv=file)) == 6
    assert steps_in(tmp_path / "log-1.csv") == [2, 3, 4, 5, 6]
    assert len(warnings_of(caplog, "log-1.csv", str(file), "IsADirectoryError")) == 1


def test_a_read_only_file_is_replaced_by_one_beside_it(tmp_path, caplog, monkeypatch):
    file = tmp_path / "log.csv"
    file.write_text("step,epoch,loss,learning_rate\r\n")
    # The owner root may write to all files.
    monkeypatch.setattr(os, "access", lambda place, mode: place != file)
    assert fit(monitor(csv=file)) == 6
    assert steps_in(file) == [] and steps_in(tmp_path / "log-1.csv") == [2, 3, 4, 5, 6]
    assert len(warnings_of(caplog, "read-only")) == 1


def test_rows_wait_for_a_full_disk(tmp_path, caplog, monkeypatch):
    file = tmp_path / "log.csv"
    append = _writers._append

    class Disk:
        """A stream on a disk with 5 free bytes."""

        def __init__(self, stream):
            self.stream, self.truncate, self.free = stream, stream.truncate, 5

        def write(self, content):
            if not self.free:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = self.stream.write(content[: self.free])
            self.free -= written
            return written

    fails = lambda stream, content, size: append(Disk(stream), content, size)  # noqa: E731

    def change(step):
        monkeypatch.setattr(_writers, "_append", fails if 2 <= step < 5 else append)

    assert fit(Hook(change), monitor(csv=file)) == 6
    assert steps_in(file) == [2, 3, 4, 5, 6]
    assert len(warnings_of(caplog, str(file), "No space left", "training continues")) == 1
    assert not warnings_of(caplog, "could not write")


def test_a_disk_that_stays_full_is_named_once_with_the_lost_rows(caplog):
    assert fit(monitor(csv="/dev/full")) == 6
    assert len(warnings_of(caplog, "/dev/full", "No space left")) == 1
    assert len(warnings_of(caplog, "could not write 5 rows to /dev/full")) == 1


def test_a_file_and_a_folder_that_vanish_are_written_again(tmp_path):
    file = tmp_path / "runs" / "log.csv"

    def remove(step):
        if step == 3:
            file.unlink()
            file.parent.rmdir()

    assert fit(Hook(remove), monitor(csv=file)) == 6
    assert steps_in(file) == [4, 5, 6]


def test_a_row_that_a_kill_cut_is_ended(tmp_path):
    file = tmp_path / "log.csv"
    fit(monitor(csv=file), steps=3)
    file.write_bytes(file.read_bytes().rstrip() + b"\r\n4,0,1.")
    fit(monitor(csv=file), steps=3)
    assert steps_in(file) == [2, 3, 4, 2, 3]


def test_tensorboard_waits_for_a_full_disk(tmp_path, caplog, monkeypatch):
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    right = record_writer.RecordWriter.flush

    def fails(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def change(step):
        monkeypatch.setattr(record_writer.RecordWriter, "flush", fails if step < 20 else right)

    assert fit(Hook(change), monitor(tensorboard=tmp_path / "board"), steps=24) == 24
    assert len(warnings_of(caplog, "board", "No space left", "training continues")) == 1
    assert not warnings_of(caplog, "could not write")
    found = b"".join(file.read_bytes() for file in (tmp_path / "board").iterdir())
    assert found.count(b"learning_rate") >= 23 and len(list((tmp_path / "board").iterdir())) < 8


def test_a_folder_of_tensorboard_that_is_a_file_does_not_end_fit(tmp_path, caplog):
    (tmp_path / "board").write_text("")
    assert fit(monitor(tensorboard=tmp_path / "board")) == 6
    assert len(warnings_of(caplog, "board", "FileExistsError", "training continues")) == 1
    assert len(warnings_of(caplog, "could not write 5 rows")) == 1


def test_a_value_that_is_no_number_does_not_end_fit(tmp_path, caplog):
    class Words:
        def begin(self, model):
            pass

        def measure(self, model, steps, seconds):
            return {"words": "two words"}

    pytest.importorskip("tensorboardX")
    given = training.Monitor([Words()], every=1, csv=tmp_path / "log.csv", tensorboard=tmp_path / "board")
    assert fit(given) == 6
    assert "two words" in (tmp_path / "log.csv").read_text() and steps_in(tmp_path / "log.csv") == [2, 3, 4, 5, 6]
    assert len(warnings_of(caplog, "board", "The row is lost")) == 1


@pytest.mark.parametrize("when", ["start", "stop"])
def test_a_trace_that_cannot_be_written_does_not_end_fit(tmp_path, caplog, monkeypatch, when):
    def fails(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_backend.device, "start_profiler", fails if when == "start" else lambda folder: fails)
    assert fit(training.Profile(tmp_path / "trace", first=2, steps=2)) == 6
    assert len(warnings_of(caplog, "Profile cannot write to", "No space left", "training continues")) == 1
    assert not warnings_of(caplog, "recorded nothing")


def test_a_folder_of_a_trace_that_is_a_file_does_not_end_fit(tmp_path, caplog):
    (tmp_path / "trace").write_text("")
    assert fit(training.Profile(tmp_path / "trace", first=2, steps=2)) == 6
    assert len(warnings_of(caplog, "Profile cannot write to", "training continues")) == 1

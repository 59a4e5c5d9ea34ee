"""Writers of monitored numbers: a CSV file and TensorBoard. Their errors never end a training."""

import contextlib
import csv
import io
import itertools
import logging
import os
import socket
import time
from pathlib import Path

from keras_jamba.training.monitoring._values import imported

_logger = logging.getLogger("keras_jamba")
_DAMAGED = ".damaged"
# Files beside each other that are tried.
_MOST_FILES = 100
_LONGEST_HEADER = 2**20


class _Log:
    """A log that keeps rows in memory until they are written.

    An error of the file system is logged once. The rows are then written with the next ones, if that succeeds.
    """

    def __init__(self, place):
        self.place, self._rows, self._failed = Path(place), [], False
        self._least = 0  # rows before the next attempt

    def write(self, step, epoch, values):
        self._rows.append((step, epoch, values))
        if len(self._rows) >= self._least:
            self._try()

    def close(self):
        if self._rows:
            self._try()
        if self._rows:
            _logger.warning("Monitor could not write %d rows to %s.", len(self._rows), self.place)
        with contextlib.suppress(OSError):
            self._close()

    def _try(self):
        try:
            self._write_rows()
            self._rows, self._least = [], 0
        except OSError as error:
            self._warn(error, "Its rows are kept, and written when that succeeds.")
        except Exception as error:  # for example a value that is no number
            self._rows = []
            self._warn(error, "The row is lost.")

    def _warn(self, error, effect):
        if not self._failed:
            _logger.warning("Monitor cannot write to %s: %r. The training continues. %s", self.place, error, effect)
        self._failed = True

    def _write_rows(self):
        raise NotImplementedError

    def _close(self):
        pass


class Table(_Log):
    """A CSV file. It is opened for each row, so that a file that was removed is written again."""

    def __init__(self, file):
        super().__init__(file)
        self._file = None

    def _write_rows(self):
        rows = [{"step": step, "epoch": epoch} | values for step, epoch, values in self._rows]
        self.place.parent.mkdir(parents=True, exist_ok=True)
        if self._file is None:
            self._file, self._columns = _choose_file(self.place, list(rows[0]))
        text = io.StringIO(newline="")
        # Later rows may lack columns. Columns that the first row lacks are dropped.
        writer = csv.DictWriter(text, self._columns, restval="", extrasaction="ignore")
        with open(self._file, "a+b", buffering=0) as stream:
            size = stream.seek(0, os.SEEK_END)
            if size == 0:
                writer.writeheader()
            else:
                stream.seek(size - 1)
                text.write("" if stream.read(1) == b"\n" else "\r\n")  # the last row of a killed process
            writer.writerows(rows)
            _append(stream, text.getvalue().encode("utf-8"), size)

    def _close(self):
        self._file = None


def _append(stream, content, size):
    """Writes all of `content` to an unbuffered stream of `size` bytes, or nothing."""
    content = memoryview(content)
    try:
        while content:
            content = content[stream.write(content) :]
    except OSError:
        with contextlib.suppress(OSError):
            stream.truncate(size)
        raise


def _choose_file(file, columns):
    """Returns the file to extend and its columns: `file`, or one beside it if `file` cannot be extended."""
    found, first = file, None
    for number in range(1, _MOST_FILES):
        have, reason = _columns(found)
        if reason is None and (have is None or set(have) == set(columns)):
            if found != file:
                _logger.warning("Monitor writes to %s, because %s cannot be extended: %s.", found, file, first)
            return found, have or columns
        first = first or reason or "it has other columns"
        found = file.with_stem(f"{file.stem}-{number}")
    raise OSError(f"{_MOST_FILES} files that cannot be extended, the first because of this: {first}")


def _columns(file):
    """Returns the column names of a CSV file and why it cannot be extended, each of them or None.

    A file that is not CSV in UTF-8 is renamed.
    """
    if not file.exists() or not (file.is_file() or file.is_dir()):  # a device, which may have no end
        return None, None
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            have = next(csv.reader([stream.readline(_LONGEST_HEADER)]), None)
    except (ValueError, csv.Error) as error:
        return None, _set_aside(file, error)
    except OSError as error:
        return None, repr(error)
    return have, None if os.access(file, os.W_OK) else "it is read-only"


def _set_aside(file, error):
    """Renames a damaged file. Returns why this failed, or None."""
    names = itertools.chain([_DAMAGED], (f"{_DAMAGED}-{i}" for i in itertools.count(1)))
    aside = next(place for name in names if not (place := file.with_name(file.name + name)).exists())
    try:
        os.rename(file, aside)
    except OSError as failure:
        return repr(failure)
    _logger.warning("Monitor renamed %s to %s, because it is not CSV in UTF-8: %s.", file, aside.name, error)
    return None


class Board(_Log):
    """A TensorBoard folder, written by tensorboardX.

    Its class SummaryWriter writes in a thread. If that thread fails, the next calls wait for it without end.
    """

    def __init__(self, folder):
        super().__init__(folder)
        imported("tensorboardX", "tensorboardX", "tensorboard=")
        self._writer, self._files = None, 0

    def _write_rows(self):
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        try:
            if self._writer is None:
                self._open()
            for step, _, values in self._rows:
                for name, value in values.items():
                    event = Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value))
                    self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError:
            # The file may end within an event. The next attempts, fewer and fewer, begin new files.
            self._least = 2 * len(self._rows)
            with contextlib.suppress(OSError):
                self._close()
            raise

    def _open(self):
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter

        self.place.mkdir(parents=True, exist_ok=True)
        # Files of one second differ in their last number.
        self._files += 1
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{self._files}"
        self._writer = RecordWriter(str(self.place / name))
        self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def _close(self):
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

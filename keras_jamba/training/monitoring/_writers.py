"""Writers of monitored numbers: a CSV file and TensorBoard."""

import csv
import logging
from pathlib import Path

from keras_jamba.training.monitoring._values import imported

_logger = logging.getLogger("keras_jamba")


class Table:
    """A CSV file whose rows are flushed one by one."""

    def __init__(self, file):
        self.file, self._stream = Path(file), None

    def write(self, step, epoch, values):
        row = {"step": step, "epoch": epoch} | values
        if self._stream is None:
            self._open(list(row))
        self._writer.writerow(row)
        self._stream.flush()

    def _open(self, columns):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        file, number = self.file, 0
        while (have := _columns(file)) is not None and set(have) != set(columns):
            number += 1
            file = self.file.with_stem(f"{self.file.stem}-{number}")
        if number:
            _logger.warning("Monitor writes to %s: %s has other columns.", file, self.file)
        self._stream = open(file, "a", newline="", encoding="utf-8")
        # Later rows may lack columns. Columns that the first row lacks are dropped.
        self._writer = csv.DictWriter(self._stream, have or columns, restval="", extrasaction="ignore")
        if have is None:
            self._writer.writeheader()

    def close(self):
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _columns(file):
    """Returns the column names of a CSV file, or None if it is absent or empty."""
    if not file.exists():
        return None
    with open(file, newline="", encoding="utf-8") as stream:
        return next(csv.reader(stream), None)


class Board:
    """A TensorBoard folder, written by tensorboardX."""

    def __init__(self, folder):
        self._writer = imported("tensorboardX", "tensorboardX", "tensorboard=").SummaryWriter(str(folder))

    def write(self, step, epoch, values):
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self):
        self._writer.flush()

"""The callback that measures probes and writes their numbers."""

import time
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Protocol

import keras
import numpy as np

from keras_jamba import _backend
from keras_jamba._typing import Logs, PathLike
from keras_jamba.ops import _checks
from keras_jamba.training.monitoring._values import numbers
from keras_jamba.training.monitoring._writers import Board, Table


# What `Monitor` needs of a probe.
class _Probe(Protocol):
    def begin(self, model: keras.Model, /) -> None: ...

    def measure(self, model: keras.Model, steps: int, seconds: float, /) -> Mapping[str, float | np.number[Any]]: ...


class Monitor(keras.callbacks.Callback):
    """A callback that measures probes at regular steps and writes their values.

    All probes are measured together, so that the device synchronises once. The last values of an epoch also enter its
    logs, for `History` and Keras' callbacks. The first step, which includes compilation, is not timed. Validation is
    not timed either. With several processes only the first one writes.

    A file that cannot be written never ends the training. The reason is logged once. Rows are kept in memory, and
    written as soon as that succeeds.

    Args:
        probes: any of `ExpertUsage`, `Throughput`, `Utilisation`, `Memory`, `GradientNorm`, `LearningRate`, or custom
            objects. A custom probe has `begin(model)` and `measure(model, steps, seconds)`. The latter returns
            `{name: number}` for the steps since the last measurement, always with the same names.
        every: steps between two measurements.
        csv: a file that gets one row per measurement: step, epoch, the model's own logs and the probes' values. Steps
            count batches, with and without gradient accumulation. A file with the same columns is extended. If the
            columns differ or the file cannot be opened, a new file is started beside it, `log-1.csv`. A file that is
            not CSV in UTF-8 is renamed to `log.csv.damaged`. Steps that a resumed training repeats appear twice.
        tensorboard: a folder for TensorBoard, written by tensorboardX, of the extra `monitoring`.

    Raises:
        ValueError: for arguments out of range; in `fit`, for a probe that the model does not support.
        ImportError: for `tensorboard` without tensorboardX.

    Example:
        >>> from keras_jamba import training
        >>> usage = training.ExpertUsage()
        >>> monitor = training.Monitor([usage, training.Throughput(64)], csv="runs/a/log.csv", tensorboard="runs/a")
        >>> history = model.fit(batches, epochs=20, callbacks=[monitor])
        >>> usage.heat_map("runs/a/experts.png")
    """

    def __init__(
        self,
        probes: Iterable[_Probe],
        every: int = 50,
        csv: PathLike | None = None,
        tensorboard: PathLike | None = None,
    ) -> None:
        super().__init__()
        _checks.check_integer("every", every)
        self.probes, self.every = list(probes), every
        writes = _backend.processes.process_index() == 0
        self._sinks: list[Table | Board] = [Table(csv)] if writes and csv is not None else []
        self._sinks += [Board(tensorboard)] if writes and tensorboard is not None else []

    def on_train_begin(self, logs: Logs = None) -> None:
        for probe in self.probes:
            probe.begin(self.model)
        self._count: Any = None
        self._compiled = False

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        if self._count is None:  # after all callbacks have restored their state
            self._count = self._wait() * (self.model.optimizer.gradient_accumulation_steps or 1)
        self._epoch, self._before = epoch, self._count
        self._values: dict[str, Any] = {}
        self._logs: Mapping[str, Any] = {}
        self._restart(0)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        # Several steps at once may reach beyond the end of the epoch.
        done = batch + 1 if self.params["steps"] is None else min(batch + 1, self.params["steps"])
        self._count, self._logs = self._before + done, logs or {}
        if not self._compiled:
            # The first step includes compilation: the clock starts after it.
            self._compiled = True
            self._wait()
            self._restart(self._count - self._before)
        elif self._count - self._before - self._timed_from >= self.every:
            self._measure()

    def on_epoch_end(self, epoch: int, logs: MutableMapping[str, Any] | None = None) -> None:
        if self._count > self._before + self._timed_from or not self._values:
            self._measure()
        if logs is not None:
            logs.update(self._values)

    def on_train_end(self, logs: Logs = None) -> None:
        for sink in self._sinks:
            sink.close()

    def _restart(self, timed_from):
        """Restarts the clock after `timed_from` steps of the epoch."""
        self._timed_from, self._started = timed_from, time.perf_counter()

    def _wait(self):
        """Synchronises with the device and returns the optimizer's step counter, which callbacks see up to date."""
        return int(numbers(self.model.optimizer.iterations))

    def _measure(self):
        self._wait()
        steps, seconds = self._count - self._before - self._timed_from, time.perf_counter() - self._started
        self._values = {}
        for probe in self.probes:
            self._values |= probe.measure(self.model, steps, seconds)
        row = _scalars(self._logs) | self._values
        for sink in self._sinks:
            sink.write(self._count, self._epoch, row)
        self._restart(self._count - self._before)


def _scalars(logs):
    """Returns the model's logs as floats. A metric with several values gives `name_0`, `name_1`, ..."""
    row = {}
    for name, value in logs.items():
        values = np.ravel(numbers(value))
        row |= {name: float(values[0])} if values.size == 1 else {f"{name}_{i}": float(x) for i, x in enumerate(values)}
    return row

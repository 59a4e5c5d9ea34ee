"""Traces of training steps, and the search for the largest batch."""

import logging
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from keras_jamba import _backend
from keras_jamba._typing import Logs, PathLike, Tensors
from keras_jamba.ops import _checks
from keras_jamba.training.monitoring import _devices

_logger = logging.getLogger("keras_jamba")


class Profile(keras.callbacks.Callback):
    """A callback that writes the backend's own trace of some steps of `fit`.

    JAX and TensorFlow write a profile for XProf and TensorBoard. PyTorch writes `trace.json` for
    https://ui.perfetto.dev and chrome://tracing.

    Args:
        folder: the folder of the trace.
        first: the first step that is recorded. Earlier steps compile and warm up.
        steps: the number of recorded steps.

    A trace that cannot be written is logged. The training continues.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(self, folder: PathLike, first: int = 10, steps: int = 5) -> None:
        super().__init__()
        _checks.check_integer("first", first, at_least=0)
        _checks.check_integer("steps", steps)
        self.folder, self.first, self.steps = Path(folder), first, steps
        self._seen, self._stop, self._failed = 0, None, False

    def on_train_begin(self, logs: Logs = None) -> None:
        if self._stop is not None:  # an earlier fit was interrupted
            self._end()
        self._seen, self._failed = 0, False

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        if self._seen == self.first:
            self._wait()
            try:
                self._stop = _backend.device.start_profiler(self.folder)
            except Exception as error:  # each backend has its own errors
                self._warn(error)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        self._seen += 1
        if self._stop is not None and self._seen >= self.first + self.steps:
            self._end()

    def on_train_end(self, logs: Logs = None) -> None:
        if self._stop is not None:
            self._end()
        elif self._seen <= self.first and not self._failed:
            _logger.warning("Profile recorded nothing: the training had %d steps, first=%d.", self._seen, self.first)

    def _end(self):
        self._wait()
        stop, self._stop = self._stop, None
        try:
            stop()
        except Exception as error:
            self._warn(error)

    def _warn(self, error):
        self._failed = True
        _logger.warning("Profile cannot write to %s: %r. The training continues.", self.folder, error)

    def _wait(self):
        # Waits for earlier steps, so that the trace excludes them.
        keras.ops.convert_to_numpy(self.model.optimizer.iterations)


def largest_batch(
    model: keras.Model, example: Sequence[Tensors], at_most: int = 4096, memory: float | None = None
) -> int:
    """Returns the largest batch size whose training step fits into memory.

    The search doubles the batch until memory runs out, then bisects the gap. Each size runs one training step, compiled
    if the backend compiles. Weights, optimizer, metrics and random generators are copied to the host's memory and
    restored after each size.

    Args:
        model: a compiled model.
        example: a batch of one example as `fit` takes it: `(x, y)` or `(x, y, weight)`, nested dicts of arrays whose
            first axis has size 1.
        at_most: the largest size that is tried.
        memory: on a CPU, the largest peak memory of the process, in bytes. It is useful because the system may kill a
            process that exhausts memory, without an error. None sets no bound. Must be None on an accelerator.

    Returns:
        The size, accurate to one eighth; 0 if not even one example fits.

    Raises:
        ValueError: for a model that is not compiled, arguments out of range, `memory` on an accelerator, or `memory`
            on a system other than Linux.
    """
    _checks.check_integer("at_most", at_most)
    if not model.compiled:
        raise ValueError(
            f"largest_batch runs training steps of a compiled model. Received: {model.name!r}, which is not compiled. "
            "Call compile first."
        )
    if memory is not None and _backend.device.device_memory():
        raise ValueError(
            "memory must be None on an accelerator: it bounds the memory of the process alone. "
            f"Received: memory={memory} on {_backend.device.device_name()}. "
            "Leave it out: the accelerator reports that its memory is exhausted."
        )
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    fits = lambda size: _fits(model, example, size, memory)  # noqa: E731
    low, high = 0, 1
    while high <= at_most and fits(high):
        low, high = high, 2 * high
    high = min(high, at_most + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(model, example, size, memory):
    batch = keras.tree.map_structure(lambda x: np.repeat(np.asarray(x), size, axis=0), tuple(example))
    variables = (*model.variables, *model.optimizer.variables, *model.metrics_variables)
    kept = [keras.ops.convert_to_numpy(variable).copy() for variable in variables]
    generators = _backend.device.get_rng_states()
    try:
        with _devices.PeakMemory(needed=memory is not None) as peak:
            model.train_on_batch(*batch)
    except Exception as error:
        if _backend.device.is_out_of_memory(error):
            return False
        raise
    finally:
        # A step that ran out of memory may have donated the variables' arrays.
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)
        if generators:
            _backend.device.set_rng_states(generators)
    return memory is None or peak.bytes <= memory

"""Where the time goes, and how large a batch may be."""

import logging
from pathlib import Path

import keras
import numpy as np

from keras_jamba import _backend
from keras_jamba.ops import _checks
from keras_jamba.training.monitoring import _devices

_logger = logging.getLogger("keras_jamba")


class Profile(keras.callbacks.Callback):
    """Writes the backend's own trace of some steps of `fit`.

    On JAX and TensorFlow a profile for XProf and TensorBoard, on PyTorch `trace.json` for https://ui.perfetto.dev and
    chrome://tracing.

    Args:
        folder: where it is written.
        first: the first step that is recorded; the ones before it compile and warm up.
        steps: how many are.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(self, folder, first=10, steps=5):
        super().__init__()
        _checks.check_integer("first", first, at_least=0)
        _checks.check_integer("steps", steps)
        self.folder, self.first, self.steps = Path(folder), first, steps
        self._seen, self._stop = 0, None

    def on_train_begin(self, logs=None):
        if self._stop is not None:  # a fit that was broken off
            self._end()
        self._seen = 0

    def on_train_batch_begin(self, batch, logs=None):
        if self._seen == self.first:
            self._wait()
            self._stop = _backend.device.start_profiler(self.folder)

    def on_train_batch_end(self, batch, logs=None):
        self._seen += 1
        if self._stop is not None and self._seen >= self.first + self.steps:
            self._end()

    def on_train_end(self, logs=None):
        if self._stop is not None:
            self._end()
        elif self._seen <= self.first:
            _logger.warning("Profile recorded nothing: the training had %d steps, first=%d.", self._seen, self.first)

    def _end(self):
        self._wait()
        self._stop()
        self._stop = None

    def _wait(self):
        # Work that was begun before belongs to the steps before.
        keras.ops.convert_to_numpy(self.model.optimizer.iterations)


def largest_batch(model, example, at_most=4096, memory=None):
    """The largest batch that a step of training has memory for.

    Doubles the batch until memory runs out, then halves the gap. Each size is a step of training of its own, compiled
    where the backend compiles. Weights, optimizer, metrics and random generators wait in the host's memory, and are put
    back after each try.

    Args:
        model: compiled.
        example: one example as `fit` takes a batch, `(x, y)` or `(x, y, weight)`, nested dicts of arrays whose
            first axis has the size 1.
        at_most: where the search ends.
        memory: bytes that the process may use at its peak, on a CPU, where the system may end a process that asks for
            more than there is instead of saying so. None is what there is. An accelerator knows its own.

    Returns:
        The size, found to within an eighth; 0 where not even one example fits.

    Raises:
        ValueError: for a model that is not compiled, arguments out of range, or a bound that cannot be watched here.
    """
    _checks.check_integer("at_most", at_most)
    if not model.compiled:
        raise ValueError(
            f"The batch is found with steps of training. Received: {model.name!r}, which is not compiled. Compile it."
        )
    if memory is not None and _backend.device.device_memory():
        raise ValueError(
            "A bound for the process says nothing of an accelerator's memory. "
            f"Received: memory={memory} on {_backend.device.device_name()}. "
            "Leave it out: what does not fit there is an error."
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
        # What ran out of memory may have given away the arrays of the variables.
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)
        if generators:
            _backend.device.set_rng_states(generators)
    return memory is None or peak.bytes <= memory

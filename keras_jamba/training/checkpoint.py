"""Saving a training every so many steps, and going on from the last save in the middle of an epoch."""

import random
import warnings

import keras
import numpy as np

from keras_jamba import _backend
from keras_jamba.ops import _checks
from keras_jamba.training import _snapshots


class Checkpoint(keras.callbacks.Callback):
    """Saves everything that a training consists of every so many steps, and goes on from the last save.

    Pass it to `fit` and, after a crash, run the same program again: `fit` then begins at the step that was saved last,
    in the middle of its epoch, and ends with the weights of a run that was never broken, bit for bit where the
    backend's own arithmetic is reproducible. A program that had come to its end does nothing more.

    A save holds the model's variables (states of random generators and statistics of routers among them), the
    optimizer's with its step, on which the schedule depends, the metrics' so far, the place in the data, and the
    states of the global random generators of Python, NumPy and PyTorch. It appears whole or not at all: it is
    written beside its place, flushed to the disk and renamed.

    Args:
        folder: where saves are kept, `step_00001200` and so on.
        data: the `keras_jamba.training.Batches` that `fit` is given. Its order is a function of the step alone;
            other data could not be gone on with in the middle of an epoch.
        every: steps between two saves. What ends an epoch is saved when the epoch, with its validation, has ended;
            the last one always.
        keep: how many saves are kept.

    Raises:
        ValueError: for arguments out of range; in `fit`, for a model that is not built or not the one that was saved,
            data of another length or seed, and a save that was damaged later.

    Example:
        >>> batches = keras_jamba.training.Batches((images, labels), batch_size=64)
        >>> checkpoint = keras_jamba.training.Checkpoint("runs/a", batches, every=500)
        >>> model.fit(batches, epochs=20, callbacks=[checkpoint])
    """

    def __init__(self, folder, data, every=1000, keep=2):
        super().__init__()
        _checks.check_integer("every", every)
        _checks.check_integer("keep", keep)
        if not hasattr(data, "begin_epoch"):
            raise ValueError(
                "The order of the data must be a function of the step. "
                f"Received: data={type(data).__name__}. Pass a keras_jamba.training.Batches, and fit on it."
            )
        self.folder, self.data, self.every, self.keep = folder, data, every, keep
        self._begin(epoch=0, step_in_epoch=0)

    def _begin(self, epoch, step_in_epoch, metrics=None, generators=None):
        """Where the epoch that comes starts: after so many of its steps, with the metrics so far.

        `generators` are states of the backend's own for its first step.
        """
        self._epoch, self._skipped, self._metrics, self._generators = epoch, step_in_epoch, metrics, generators
        self._last, self._quiet, self._held = self._step(step_in_epoch), None, None

    def _step(self, step_in_epoch):
        return self._epoch * self.data.steps_per_epoch + step_in_epoch

    def on_train_begin(self, logs=None):
        model = self.model
        if not model.built:
            raise ValueError(
                "A model must have its variables before a checkpoint is loaded into them. "
                f"Received: {model.name!r}, built=False. Build it, or call it on a batch, before fit."
            )
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._begin(epoch=0, step_in_epoch=0)
        steps = _snapshots.steps(self.folder)
        if steps:
            self._load(steps[-1])

    def on_epoch_begin(self, epoch, logs=None):
        self.model._initial_epoch = None  # Keras would keep it for the next fit
        if epoch != self._epoch:
            self._begin(epoch, step_in_epoch=0)
        self.data.begin_epoch(epoch, self._skipped)
        if self._skipped:
            self._assign(self.model.metrics_variables, self._metrics)
            # The rest of an epoch is shorter than Keras was told.
            self._quiet = warnings.catch_warnings()
            self._quiet.__enter__()
            warnings.filterwarnings("ignore", message="Your input ran out of data")

    def on_train_batch_begin(self, batch, logs=None):
        # Between two epochs PyTorch's loaders draw numbers, and how many depends on how an epoch ended.
        if self._generators:
            _backend.set_random_states(self._generators)
        self._generators = None

    def on_train_batch_end(self, batch, logs=None):
        done = self._skipped + batch + 1
        if done < self.data.steps_per_epoch and self._is_due(self._step(done)):
            self._save(done)
        if done == self.data.steps_per_epoch:
            self._generators = _backend.random_states()
            if self._skipped:
                self._held = [keras.ops.convert_to_numpy(variable).copy() for variable in self._variables()[0]]

    def on_test_begin(self, logs=None):
        self._undo_broken_step()

    def _undo_broken_step(self):
        """Keras finds the end of a shorter epoch by a step without data.

        In a graph of TensorFlow what does not depend on the data has been done by then: seeds move on, weights decay.
        """
        if self._held is not None:
            self._assign(self._variables()[0], self._held)
            self._held = None

    def on_epoch_end(self, epoch, logs=None):
        self._undo_broken_step()
        if self._quiet:
            self._quiet.__exit__(None, None, None)
        self._epoch, self._skipped, self._quiet = epoch + 1, 0, None
        if self._is_due(self._step(0)) or epoch + 1 == self.params["epochs"] or self.model.stop_training:
            self._save(0)

    def _is_due(self, step):
        return step // self.every > self._last // self.every

    def _variables(self):
        # Metrics last: an epoch begins by setting them back.
        model = self.model
        return [*model.variables, *model.optimizer.variables], list(model.metrics_variables)

    def _save(self, step_in_epoch):
        variables, metrics = self._variables()
        step = self._last = self._step(step_in_epoch)
        state = {
            "epoch": self._epoch,
            "step_in_epoch": step_in_epoch,
            "data": self._data_signature(),
            "variables": len(variables) + len(metrics),
            "python": random.getstate(),
            "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        }
        arrays = [keras.ops.convert_to_numpy(variable) for variable in (*variables, *metrics)]
        _snapshots.write(
            self.folder, step, [*arrays, *(self._generators or _backend.random_states())], state, self.keep
        )

    def _load(self, step):
        arrays, state = _snapshots.read(self.folder, step)
        arrays, generators = arrays[: state["variables"]], arrays[state["variables"] :]
        variables, metrics = self._variables()
        if len(variables) + len(metrics) < len(arrays):
            # On TensorFlow metrics have no variables before the first step.
            self.model.test_on_batch(*self.data.batch(0))
            variables, metrics = self._variables()
        self._check(arrays, [*variables, *metrics], state)
        self._assign(variables, arrays[: len(variables)])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(tuple(state["numpy"]))
        self._begin(state["epoch"], state["step_in_epoch"], arrays[len(variables) :], generators)
        self.model._initial_epoch = state["epoch"]  # as Keras' own BackupAndRestore has it

    def _check(self, arrays, variables, state):
        have = [tuple(variable.shape) for variable in variables]
        saved = [x.shape for x in arrays]
        if have != saved:
            differ = [
                f"{v.path} {shape}" for v, shape, other in zip(variables, have, saved, strict=False) if shape != other
            ]
            raise ValueError(
                "A training goes on with the model, the optimizer and the metrics that it was saved with. Received: "
                f"{len(have)} variables where {len(saved)} were saved in {str(self.folder)!r}; "
                f"{'the first that differs: ' + differ[0] if differ else 'those there fit'}. "
                "Make them as they were, or save into another folder."
            )
        if state["data"] != self._data_signature():
            raise ValueError(
                "A training goes on with the data that it was saved with. Received: "
                f"{self._data_signature()} where {state['data']} was saved in {str(self.folder)!r}. "
                "Make the batches as they were, or save into another folder."
            )

    def _data_signature(self):
        return {"steps_per_epoch": self.data.steps_per_epoch, "seed": self.data.seed}

    @staticmethod
    def _assign(variables, arrays):
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)

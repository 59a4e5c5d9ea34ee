"""Saving a training every so many steps, and going on from the last save in the middle of an epoch."""

import itertools
import logging
import random
import secrets
import warnings
from pathlib import Path

import keras
import numpy as np

from keras_jamba import _backend, _keras_internals
from keras_jamba.ops import _checks
from keras_jamba.training.checkpointing import _saves, _snapshots

_logger = logging.getLogger("keras_jamba")


class Checkpoint(keras.callbacks.Callback):
    """Saves everything that a model's training consists of every so many steps, and goes on from the last save.

    Pass it to `fit` and, after a crash, run the same program again: `fit` then begins at the step that was saved last,
    in the middle of its epoch, and ends with the weights of a run that was never broken, bit for bit where the
    backend's own arithmetic is reproducible. A program that had come to its end, or that a callback had stopped, does
    nothing more.

    A save holds the model's variables (states of random generators and statistics of routers among them), the
    optimizer's with its step, on which the schedule depends, the metrics' so far, the place in the data, and the
    states of the global random generators of Python, NumPy and PyTorch. What other callbacks remember is theirs. A
    save appears whole or not at all: it is written beside its place, flushed to the disk and renamed. Weights that are
    not finite are not saved.

    Where processes train together each has a folder of its own in `folder`, which all must see, and writes the pieces
    of variables that its devices have, one after the other; a save that not all have written does not count. Pieces
    are put together for any other mesh, number of devices and number of processes: weights and the optimizer go on as
    they were, and so does the place in the data, whose batches have the same examples for any `Batches(shard=)` of
    the same `batch_size`. What belongs to one process, the states of Python's, NumPy's and PyTorch's generators, comes
    back only where as many processes go on; other numbers begin with what the program has seeded. Metrics of the
    epoch, and weights like batch norm's that differ among processes of PyTorch, are then those of process 0.

    Args:
        folder: where saves are kept, `step_00001200` and so on.
        data: the `keras_jamba.training.Batches` that `fit` is given. Its order is a function of the step alone;
            other data could not be gone on with in the middle of an epoch.
        every: steps between two saves. What ends an epoch is saved when the epoch, with its validation, has ended;
            the last one always.
        keep: how many saves are kept.

    Raises:
        ValueError: for arguments out of range; in `fit`, for a model that is not built, not the one that was saved, or
            further than what was saved; for other data, a `batch_size` for another number of processes included; for a
            save that was damaged later; and where processes see different saves.

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
        self.data, self.every, self.keep = data, every, keep
        self.folder = Path(folder)
        # Models are split among processes that may all read the same batches.
        place = (_backend.processes.process_index(), _backend.processes.process_count())
        self._index, self._count = place if place[1] > 1 else data.shard
        self._quiet = None
        self._begin(epoch=0, step_in_epoch=0)

    def _begin(self, epoch, step_in_epoch, metrics=None, generators=None):
        """Where the epoch that comes starts: after so many of its steps, with the metrics so far.

        `generators` are states of the backend's own for its first step.
        """
        self._epoch, self._skipped, self._done = epoch, step_in_epoch, step_in_epoch
        self._metrics, self._generators, self._held = metrics, generators, None
        self._last = self._step(step_in_epoch)

    def _step(self, step_in_epoch):
        return self._epoch * self.data.steps_per_epoch + step_in_epoch

    def on_train_begin(self, logs=None):
        model = self.model
        self._end_quiet()
        _keras_internals.set_initial_epoch(model, None)  # of a fit that found nothing to do
        if not model.built:
            raise ValueError(
                "A model must have its variables before a checkpoint is loaded into them. "
                f"Received: {model.name!r}, built=False. Build it, or call it on a batch, before fit."
            )
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._begin(epoch=0, step_in_epoch=0)
        self._saved_as_stopped = False
        # Pieces of two runs that come to the same step are not mixed.
        self._run = (
            _backend.processes.all_gather_int(secrets.randbelow(2**31))[0]
            if _backend.processes.process_count() > 1
            else 0
        )
        step, processes = _saves.last(self.folder, self._count) or (-1, 0)
        seen = _backend.processes.all_gather_int(step)
        if len(set(seen)) > 1:
            raise ValueError(
                "Processes that train together must see the same saves. Received: the steps "
                f"{seen} as the last ones in {str(self.folder)!r}, -1 for none. Give it a disk that all share."
            )
        if processes:
            self._load(step, _saves.folders(self.folder, processes))

    def on_epoch_begin(self, epoch, logs=None):
        _keras_internals.set_initial_epoch(self.model, None)  # Keras would keep it for the next fit
        if epoch != self._epoch:
            self._begin(epoch, step_in_epoch=0)
        self.data.begin_epoch(epoch, self._skipped)
        self._done = self._skipped
        if self._skipped:
            for variable, saved in zip(self.model.metrics_variables, self._metrics, strict=True):
                _backend.processes.assign_from_shards(variable, saved.read)
            self._metrics = None  # keeps a file open, whose room on the disk would not be free when it is removed
            # The rest of an epoch is shorter than Keras was told.
            self._quiet = warnings.catch_warnings()
            self._quiet.__enter__()
            warnings.filterwarnings("ignore", message="Your input ran out of data")

    def on_train_batch_begin(self, batch, logs=None):
        # Between two epochs PyTorch's loaders draw numbers, and how many depends on how an epoch ended.
        if self._generators:
            _backend.device.set_rng_states(self._generators)
        self._generators = None

    def on_train_batch_end(self, batch, logs=None):
        # Several steps at once may reach beyond the end of the epoch.
        self._done = min(self._skipped + batch + 1, self.data.steps_per_epoch)
        if self._done < self.data.steps_per_epoch:
            if self._is_due():
                self._save()
            return
        self._generators = _backend.device.get_rng_states()
        if self._skipped and _backend.trainer.runs_step_without_data():
            self._held = list(map(_copies, self._variables()))

    def on_test_begin(self, logs=None):
        self._undo_broken_step()

    def on_epoch_end(self, epoch, logs=None):
        self._undo_broken_step(logs)
        self._end_quiet()
        if self._done == self.data.steps_per_epoch:
            self._epoch, self._done = epoch + 1, 0
        self._skipped = 0
        if self._is_due() or epoch + 1 == self.params["epochs"] or self.model.stop_training:
            self._save()

    def on_train_end(self, logs=None):
        self._end_quiet()
        _keras_internals.set_initial_epoch(self.model, None)
        # Callbacks that come later in the list stop a training after this one has seen the epoch's end.
        if self.model.stop_training and not self._saved_as_stopped:
            self._save()

    def _undo_broken_step(self, logs=None):
        """Keras finds the end of a shorter epoch by a step without data.

        In a graph of TensorFlow what does not depend on the data has been done by then: seeds move on, weights decay,
        metrics count. Validation needs the model, the end of the epoch also its metrics, in its logs.
        """
        if self._held is None:
            return
        variables, metrics = self._variables()
        if self._held[0] is not None:
            self._assign(variables, self._held[0])
            self._held[0] = None
        if logs is not None:
            self._assign(metrics, self._held[1])
            for name, value in self.model.get_metrics_result().items():
                value = keras.ops.convert_to_numpy(value)
                logs |= {name: value if value.ndim else float(value)} if name in logs else {}
            self._held = None

    def _end_quiet(self):
        if self._quiet is not None:
            self._quiet.__exit__(None, None, None)
            self._quiet = None

    def _is_due(self):
        return self._step(self._done) // self.every > self._last // self.every

    def _variables(self):
        # Metrics apart: an epoch begins by setting them back.
        model = self.model
        return [*model.variables, *model.optimizer.variables], list(model.metrics_variables)

    def _save(self):
        variables, metrics = self._variables()
        # All processes write, or none.
        if not all(_backend.processes.all_gather_int(all(map(_is_finite, self.model.trainable_variables)))):
            _logger.warning("Checkpoint keeps the save before: the weights are not finite.")
            return
        step = self._last = self._step(self._done)
        self._saved_as_stopped = bool(self.model.stop_training)
        variables += metrics
        state = {
            "processes": self._count,
            "run": self._run,
            "epoch": self._epoch,
            "step_in_epoch": self._done,
            "stopped": self._saved_as_stopped,
            "data": self._data_signature(),
            "variables": len(variables),
            "python": random.getstate(),
            "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        }
        arrays = ((variable.shape, _backend.processes.local_shards(variable)) for variable in variables)
        generators = map(_snapshots.as_single_shard, self._generators or _backend.device.get_rng_states())
        place = _saves.folders(self.folder, self._count)[self._index]
        _snapshots.write(place, step, itertools.chain(arrays, generators), state)
        _backend.processes.all_gather_int(step)  # the save before stays until all have written this one
        _saves.remove_old(self.folder, self._count, self._index, step, self.keep)

    def _load(self, step, places):
        self._check_as_written(step, places)
        arrays, generators, state = _saves.read(places, step, self._index)
        variables, metrics = self._variables()
        if len(variables) + len(metrics) < len(arrays):
            # On TensorFlow metrics have no variables before the first step.
            x, y, weight = keras.utils.unpack_x_y_sample_weight(self.data.batch(0))
            self.model.test_on_batch(x, y, weight)
            variables, metrics = self._variables()
        self._check(arrays, [*variables, *metrics], state)
        self._check_not_further(variables, arrays, step)
        for variable, saved in zip(variables, arrays[: len(variables)], strict=True):
            _backend.processes.assign_from_shards(variable, saved.read)
        same = len(places) == self._count
        self._begin(
            state["epoch"],
            state["step_in_epoch"],
            arrays[len(variables) :] if state["step_in_epoch"] else None,
            [saved.read() for saved in generators] if same else None,
        )
        if same:
            version, internal, gauss = state["python"]
            random.setstate((version, tuple(internal), gauss))
            np.random.set_state(tuple(state["numpy"]))
        else:
            _logger.warning(
                "Checkpoint: a save of %d process(es) goes on in %d. Random generators are as the program has seeded "
                "them; what each process had of its own, metrics of this epoch, is that of process 0.",
                len(places),
                self._count,
            )
        # As Keras' own BackupAndRestore has it.
        epoch = self.params["epochs"] if state["stopped"] else state["epoch"]
        _keras_internals.set_initial_epoch(self.model, epoch)

    def _check_as_written(self, step, places):
        """Each process reads its share of the files, and all know before any of them has loaded anything."""
        found = _saves.damaged(places[_backend.processes.process_index() :: _backend.processes.process_count()], step)
        if any(_backend.processes.all_gather_int(found is not None)):
            raise ValueError(
                "A save must be as it was written, by its sha256. Received: "
                f"step {step}, which is not, in {str(found or self.folder)!r}. Remove it: the one before it, if there "
                "is one, is taken then."
            )

    def _check(self, arrays, variables, state):
        have = [tuple(variable.shape) for variable in variables]
        saved = [x.shape for x in arrays]
        if have != saved:
            pairs = zip(variables, have, saved, strict=False)
            differ = [f"{variable.path} {shape}" for variable, shape, other in pairs if shape != other]
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
                "Make the batches as they were, or save into another folder; batch_size, that of all processes "
                "together, is the same for any number of them."
            )

    def _check_not_further(self, variables, arrays, step):
        """Training between two fits with a checkpoint would be lost without a word."""
        iterations = _keras_internals.step_counter(self.model.optimizer)
        place = next(i for i, variable in enumerate(variables) if variable is iterations)
        if int(keras.ops.convert_to_numpy(iterations)) > int(arrays[place].read()):
            raise ValueError(
                "A save is loaded into a model that has not gone further. Received: a model after "
                f"{int(keras.ops.convert_to_numpy(iterations))} steps, and step {step} in {str(self.folder)!r}. "
                "Give this fit a folder of its own, or make the model anew."
            )

    def _data_signature(self):
        names = ("num_examples", "batch_size", "steps_per_epoch", "shuffle", "seed")
        return {name: getattr(self.data, name) for name in names}

    @staticmethod
    def _assign(variables, arrays):
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)


def _is_finite(variable):
    return all(np.isfinite(piece).all() for _, piece in _backend.processes.local_shards(variable))


def _copies(variables):
    return [keras.ops.convert_to_numpy(variable).copy() for variable in variables]

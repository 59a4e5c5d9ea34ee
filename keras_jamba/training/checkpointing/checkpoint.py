"""A callback that saves a training at regular steps, and resumes it within an epoch."""

import errno
import itertools
import logging
import random
import secrets
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_jamba import _backend, _keras_internals, _keras_optimizers
from keras_jamba._typing import Logs, PathLike
from keras_jamba.models import _training_loops
from keras_jamba.ops import _checks
from keras_jamba.training.checkpointing import _identity, _saves, _snapshots
from keras_jamba.training.data import Batches

_logger = logging.getLogger("keras_jamba")


class Checkpoint(keras.callbacks.Callback):
    """A callback that saves the complete state of a training at regular steps, and resumes from the last save.

    Pass it to `fit`. After a crash, run the same program again: `fit` then starts at the last saved step, within its
    epoch. It ends with the weights of an uninterrupted run, bit for bit if the backend's arithmetic is reproducible.
    A finished training, or one that a callback had stopped, does not train further.

    A save holds these parts:

    - the model's variables, including states of random generators and statistics of routers;
    - the optimizer's variables, including the step, which the schedule needs;
    - the metrics' variables, and the position in the data;
    - the states of the global random generators of Python, NumPy and PyTorch.

    A save does not hold the state of other callbacks. Saves are atomic: each is written to a temporary folder, flushed
    to disk and renamed. Weights that are not finite are not saved.

    With several processes, each writes the local shards of its devices, one by one, to its own folder in `folder`. All
    processes must see `folder`. A save that lacks a process does not count. Saves load into any other mesh, number of
    devices and number of processes: weights, optimizer and position in the data continue unchanged. Batches have the
    same examples for any `Batches(shard=)` of the same `batch_size`.

    The states of Python's, NumPy's and PyTorch's generators belong to one process. They are restored only if the number
    of processes is the same; otherwise the program's own seeds apply. In that case metrics of the epoch come from
    process 0. So do weights that differ among PyTorch processes, such as batch norm's.

    Args:
        folder: the folder of the saves, `step_00001200` and so on.
        data: the `keras_jamba.training.Batches` that is passed to `fit`. Its order is a function of the step alone,
            which resuming within an epoch requires.
        every: steps between two saves. A save due at the last step of an epoch follows its validation. The last epoch
            is always saved.
        keep: the number of saves to keep.

    A training resumes with the model, the optimizer and the metrics of its save. Compared are the classes of the model
    and the optimizer, and the number, kinds and shapes of all variables. Of models of this library, the constructor
    arguments that change outputs are compared too. Other arguments may change: dropout, drop_path,
    gradient_checkpointing, those of auxiliary losses, class_names, pixel_range, image_shape and ids of special tokens.
    So may the dtype policy and the optimizer's arguments, but a constant learning rate comes from the save. Saves of
    earlier versions are compared by shapes alone.

    Raises:
        ValueError: for arguments out of range. In `fit`, for a model that is not built, differs from the saved one, or
            has trained beyond the save. Also for other data, including a `batch_size` for another number of processes;
            for a damaged save; and if processes see different saves.
        OSError: in `fit`, before the first step, if `folder` is a file, or if a folder or file of a save cannot be
            read.

    Example:
        >>> batches = keras_jamba.training.Batches((images, labels), batch_size=64)
        >>> checkpoint = keras_jamba.training.Checkpoint("runs/a", batches, every=500)
        >>> history = model.fit(batches, epochs=20, callbacks=[checkpoint])
    """

    def __init__(self, folder: PathLike, data: Batches, every: int = 1000, keep: int = 2) -> None:
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
        # With model parallelism all processes may read the same batches, so `data.shard` does not count them.
        place = (_backend.processes.process_index(), _backend.processes.process_count())
        self._index, self._count = place if place[1] > 1 else data.shard
        self._quiet: warnings.catch_warnings | None = None
        self._begin(epoch=0, step_in_epoch=0)

    def _begin(self, epoch, step_in_epoch, metrics=None, generators=None):
        """Sets where the next epoch starts: after `step_in_epoch` steps, with `metrics` so far.

        `generators` are the states of the backend's random generators for its first step.
        """
        self._epoch, self._skipped, self._done = epoch, step_in_epoch, step_in_epoch
        self._metrics, self._generators, self._held = metrics, generators, None
        self._last = self._step(step_in_epoch)

    def _step(self, step_in_epoch):
        return self._epoch * self.data.steps_per_epoch + step_in_epoch

    def on_train_begin(self, logs: Logs = None) -> None:
        model = self.model
        self._end()
        # An interrupted `fit` calls no callback at its end.
        _training_loops.at_end_of_loop(model, self._end)
        if not model.built:
            raise ValueError(
                "A model must have its variables before a checkpoint is loaded into them. "
                f"Received: {model.name!r}, built=False. Build it, or call it on a batch, before fit."
            )
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._begin(epoch=0, step_in_epoch=0)
        self._saved_as_stopped = False
        # Identifies the run: shards that two runs wrote for one step are never mixed.
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

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        _keras_internals.set_initial_epoch(self.model, None)  # else Keras keeps it for the next fit
        if epoch != self._epoch:
            self._begin(epoch, step_in_epoch=0)
        self.data.begin_epoch(epoch, self._skipped)
        self._done = self._skipped
        if self._skipped:
            for variable, saved in zip(self.model.metrics_variables, self._metrics, strict=True):
                _backend.processes.assign_from_shards(variable, saved.read)
            self._metrics = None  # closes the file, so that removing it frees disk space
            # The resumed epoch is shorter than Keras expects.
            self._quiet = warnings.catch_warnings()
            self._quiet.__enter__()
            warnings.filterwarnings("ignore", message="Your input ran out of data")

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        # PyTorch's loaders draw numbers between epochs. Their count depends on how the epoch ended.
        if self._generators:
            _backend.device.set_rng_states(self._generators)
        self._generators = None

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if not getattr(self.data, "_was_read", True):
            raise ValueError(
                "Checkpoint and fit must have the same data object. Received: a step of fit that read nothing from "
                f"the {type(self.data).__name__} of Checkpoint. Pass one object to both."
            )
        # Several steps at once may reach beyond the end of the epoch.
        self._done = min(self._skipped + batch + 1, self.data.steps_per_epoch)
        if self._done < self.data.steps_per_epoch:
            if self._is_due():
                self._save()
            return
        self._generators = _backend.device.get_rng_states()
        if self._skipped and _backend.trainer.runs_step_without_data():
            self._held = list(map(_copies, self._variables()))

    def on_test_begin(self, logs: Logs = None) -> None:
        self._undo_broken_step()

    def on_epoch_end(self, epoch: int, logs: MutableMapping[str, Any] | None = None) -> None:
        self._undo_broken_step(logs)
        self._end_quiet()
        if self._done == self.data.steps_per_epoch:
            self._epoch, self._done = epoch + 1, 0
        self._skipped = 0
        if self._is_due() or epoch + 1 == self.params["epochs"] or self.model.stop_training:
            self._save()

    def on_train_end(self, logs: Logs = None) -> None:
        self._end()
        # Later callbacks in the list may stop the training after this one's on_epoch_end.
        if self.model.stop_training and not self._saved_as_stopped:
            self._save()

    def _undo_broken_step(self, logs=None):
        """Restores the variables that Keras' step without data at the end of a resumed epoch has changed.

        In a TensorFlow graph such a step runs all operations that do not depend on the data: seeds advance, weights
        decay, metrics count. Validation needs the model restored. The end of the epoch also needs its metrics, in
        `logs`.
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

    def _end(self):
        self._end_quiet()
        _keras_internals.set_initial_epoch(self.model, None)

    def _end_quiet(self):
        if self._quiet is not None:
            self._quiet.__exit__(None, None, None)
            self._quiet = None

    def _is_due(self):
        return self._step(self._done) // self.every > self._last // self.every

    def _variables(self):
        # Metrics are separate because Keras resets them at the start of an epoch.
        model = self.model
        return [*model.variables, *model.optimizer.variables], list(model.metrics_variables)

    def _save(self):
        variables, metrics = self._variables()
        # All processes write, or none.
        if not all(_backend.processes.all_gather_int(all(map(_is_finite, self.model.trainable_variables)))):
            _logger.warning("Checkpoint keeps the previous save: the weights are not finite.")
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
            **_identity.of_training(self.model, variables),
            "python": random.getstate(),
            "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        }
        arrays = ((variable.shape, _backend.processes.local_shards(variable)) for variable in variables)
        generators = map(_snapshots.as_single_shard, self._generators or _backend.device.get_rng_states())
        place = _saves.folders(self.folder, self._count)[self._index]
        _snapshots.write(place, step, itertools.chain(arrays, generators), state)
        _backend.processes.all_gather_int(step)  # keeps the previous save until all have written this one
        _saves.remove_old(self.folder, self._count, self._index, step, self.keep)

    def _load(self, step, places):
        self._check_as_written(step, places)
        arrays, generators, state = _saves.read(places, step, self._index)
        variables, metrics = self._variables()
        if len(variables) + len(metrics) < len(arrays):
            # On TensorFlow the first step creates the metrics' variables.
            x, y, weight = keras.utils.unpack_x_y_sample_weight(self.data.batch(0))
            self.model.test_on_batch(x, y, weight)
            variables, metrics = self._variables()
        self._check(arrays, [*variables, *metrics], state)
        self._check_not_further(variables, arrays, step)
        same = len(places) == self._count
        place = _snapshots.place_of(places[self._index], step) if same else None
        random_states = _saves.random_states(state, place) if same else None
        for variable, saved in zip(variables, arrays[: len(variables)], strict=True):
            _backend.processes.assign_from_shards(variable, saved.read)
        self._begin(
            state["epoch"],
            state["step_in_epoch"],
            arrays[len(variables) :] if state["step_in_epoch"] else None,
            [saved.read() for saved in generators] if same else None,
        )
        if same:
            random.setstate(random_states[0])
            np.random.set_state(random_states[1])
        else:
            _logger.warning(
                "Checkpoint: a save of %d process(es) continues in %d. Random generators keep the program's seeds. "
                "State that each process had of its own, such as metrics of this epoch, comes from process 0.",
                len(places),
                self._count,
            )
        # As in Keras' BackupAndRestore.
        epoch = self.params["epochs"] if state["stopped"] else state["epoch"]
        _keras_internals.set_initial_epoch(self.model, epoch)

    def _check_as_written(self, step, places):
        """Checks the sha256 of all files, which processes share, before any process loads a variable."""
        index, count = _backend.processes.process_index(), _backend.processes.process_count()
        found = unreadable = None
        try:
            found = _saves.damaged(places[index::count], step)
        except OSError as error:
            unreadable = error
        # The other processes wait for this number.
        outcomes = _backend.processes.all_gather_int(2 if unreadable else int(found is not None))
        if unreadable:
            raise unreadable
        if 2 in outcomes:
            message = f"All processes must read step {step}. Received: an OSError in another one. It names the path"
            raise OSError(errno.EIO, message, str(self.folder))
        if any(outcomes):
            raise ValueError(
                "A save must match the sha256 in its state. Received: "
                f"step {step}, which does not, in {str(found or self.folder)!r}. Remove it: training then resumes from "
                "the previous save, if there is one."
            )

    def _check(self, arrays, variables, state):
        have, saved = [tuple(variable.shape) for variable in variables], [x.shape for x in arrays]
        differ = _identity.differences(state, _identity.of_training(self.model, variables), variables)
        if have != saved:
            pairs = zip(variables, have, saved, strict=False)
            first = next((f"{variable.path} {shape}" for variable, shape, other in pairs if shape != other), None)
            which = "the common ones match" if first is None else f"the first that differs: {first}"
            differ.append(f"{len(have)} variables where {len(saved)} were saved; {which}")
        if differ:
            raise ValueError(
                "A training resumes with the model, the optimizer and the metrics that it was saved with. Received: "
                f"{'; '.join(differ)}, in {str(self.folder)!r}. Make them as they were, or save into another folder."
            )
        if state["data"] != self._data_signature():
            raise ValueError(
                "A training resumes with the data that it was saved with. Received: "
                f"{self._data_signature()} where {state['data']} was saved in {str(self.folder)!r}. "
                "Make the batches as they were, or save into another folder. batch_size counts the examples of all "
                "processes together."
            )

    def _check_not_further(self, variables, arrays, step):
        """Checks that loading the save does not discard later training, such as a fit without checkpoint."""
        iterations = _keras_optimizers.step_counter(self.model.optimizer)
        place = next(i for i, variable in enumerate(variables) if variable is iterations)
        if int(keras.ops.convert_to_numpy(iterations)) > int(arrays[place].read()):
            raise ValueError(
                "The model must not have trained beyond the save. Received: a model after "
                f"{int(keras.ops.convert_to_numpy(iterations))} steps, and step {step} in {str(self.folder)!r}. "
                "Use another folder for this fit, or build a new model."
            )

    def _data_signature(self):
        names = ("num_examples", "batch_size", "steps_per_epoch", "shuffle", "seed")
        return {name: getattr(self.data, name) for name in names}

    @staticmethod
    def _assign(variables, arrays):
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)


def _is_finite(variable):
    return all(np.isfinite(shard).all() for _, shard in _backend.processes.local_shards(variable))


def _copies(variables):
    return [keras.ops.convert_to_numpy(variable).copy() for variable in variables]

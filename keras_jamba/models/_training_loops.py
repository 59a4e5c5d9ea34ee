"""The running `fit`, `evaluate` and `predict` loops of a model."""

import contextlib
import itertools
import sys
import threading

import keras

from keras_jamba import _backend, _keras_internals


class TrainingLoops(threading.local):
    """The loops of one model that run in the current thread, and the check of their first batch.

    Args:
        lock: a lock that all threads share.
        owners: a list `[(thread id, method)]` of the thread that trains or evaluates; all threads share it.

    Attributes:
        running: the loops of this thread, the innermost last.
        inside_step: whether this thread runs or traces a step.
    """

    def __init__(self, lock, owners):
        self.lock, self.owners = lock, owners
        self.running, self.inside_step = [], False

    @classmethod
    def of(cls, model):
        """Returns the loops of a model."""
        # Stored in `__dict__`, because Keras tracks attributes set by setattr. Saves and copies of the model omit it.
        found = vars(model).get("_training_loops")
        return vars(model).setdefault("_training_loops", cls(threading.Lock(), [])) if found is None else found

    @property
    def innermost(self):
        """The innermost loop of this thread, or None."""
        return self.running[-1] if self.running else None

    @contextlib.contextmanager
    def run(self, kind):
        """Runs the loop `kind`, for example "fit", as a context.

        Raises:
            RuntimeError: if another thread trains or evaluates the model.
            ValueError: if the data has no batch.
        """
        self._end_abandoned()
        loop = _backend.trainer.Loop(kind)
        # This frame is of the generator, and the next one of contextlib.
        loop.frame, loop.at_end = sys._getframe(2), contextlib.ExitStack()
        if self.running:
            # A callback evaluates: the outer loop holds the newest values.
            self.running[-1].sync()
        inside_step = self.inside_step
        try:
            self.running.append(loop)
            # The scopes end first: inside a scope, variables would not take the values that the loop assigns.
            with self._exclusive(kind), loop, loop.at_end, _keras_internals.restored_scopes():
                yield loop
        except UnboundLocalError as error:
            # Keras' `predict` raises it without a batch.
            if loop.checked:
                raise
            raise _no_data(kind) from error
        finally:
            self.running[:] = [other for other in self.running if other is not loop]
            self.inside_step, loop.frame = inside_step, None
        if not loop.checked and (loop.has_begun or kind in ("evaluate", "predict")):
            raise _no_data(kind)

    @contextlib.contextmanager
    def _exclusive(self, kind):
        """Raises RuntimeError if two threads train or evaluate: they share metrics, optimizer and weights."""
        if kind in ("predict", "predict_on_batch"):
            yield
            return
        owner = (threading.get_ident(), kind)
        try:
            with self.lock:
                other = next((running for thread, running in self.owners if thread != owner[0]), None)
                if other is not None:
                    raise RuntimeError(
                        "One thread at a time may train or evaluate a model; generate, stream and predict may run "
                        f"beside it. Received: {kind}, while another thread runs {other}. Wait for it, or use a copy "
                        "of the model."
                    )
                self.owners.append(owner)
            yield
        finally:
            with self.lock:
                self.owners[:] = [other for other in self.owners if other is not owner]

    def _end_abandoned(self):
        """Ends the loops of this thread that an interrupt has ended before they could end themselves."""
        if not self.running and not self.inside_step and not self.owners:
            return
        frames, frame = set(), sys._getframe()
        while frame is not None:
            frames.add(frame)
            frame = frame.f_back
        for loop in [loop for loop in self.running if loop.frame not in frames]:
            with loop, loop.at_end:
                self.running.remove(loop)
        if not self.running:
            here = threading.get_ident()
            with self.lock:
                self.owners[:] = [owner for owner in self.owners if owner[0] != here]
            self.inside_step = False

    def check(self, model, data):
        """Passes a batch of Keras' iterators to the model's `check_batch`."""
        # Copies a batch from the accelerator to the host, once per loop.
        on_host = lambda x: _backend.sharding.to_numpy(x) if keras.ops.is_tensor(x) else x  # noqa: E731
        batch = keras.tree.map_structure(on_host, _backend.trainer.local_batch(data), none_is_leaf=False)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        if self.innermost.kind == "predict":
            model.check_batch(x)
        else:
            model.check_batch(x, y, sample_weight)

    def checked_step(self, model, function):
        """Returns a step of Keras' loops that checks the first batch of each loop."""

        def step(*given):
            loop = self.innermost
            if loop is not None and not loop.checked:
                check = lambda data: self.check(model, data)  # noqa: E731
                given = _backend.trainer.first_batch(given, check, model.steps_per_execution)
                loop.checked = True
            before, self.inside_step = self.inside_step, True
            try:
                return function(*given)
            finally:
                self.inside_step = before

        return step

    def checked_first_batches(self, model, iterator):
        """Yields the items of `iterator` after a check: Keras builds the model on this batch before the first step."""
        for begin, end, data in iterator:
            batches = data if isinstance(data, list) else list(itertools.islice(data, 1))
            if not batches:
                break
            self.check(model, batches[0])
            yield begin, end, batches if batches is data else iter(batches)
        raise _no_data(self.innermost.kind)


def at_end_of_loop(model, function):
    """Calls `function()` when the innermost loop of a model ends, also by an interrupt. Other models have no loops."""
    loops = vars(model).get("_training_loops")
    if loops is not None and loops.running:
        loops.innermost.at_end.callback(function)


def check_is_sharded(model):
    """Raises RuntimeError if the active distribution does not shard the model's weights."""
    if reason := _backend.sharding.why_not_sharded(model):
        raise RuntimeError(
            f"The weights of this model must be sharded over the devices. Received: {reason}. Share batches by "
            "training.DataParallel instead, or shard the model on JAX by training.layout_map."
        )


def _no_data(kind):
    """Returns the ValueError for data without examples."""
    return ValueError(
        f"The data of {kind} must have at least one example. Received: none. Check how the data was read and selected."
    )

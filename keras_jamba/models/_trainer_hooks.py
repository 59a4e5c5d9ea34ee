"""What our models add to the loops of Keras: a check of the first batch, and steps that a backend makes faster."""

import contextlib
import functools
import itertools
import threading

import keras

from keras_jamba import _backend, _keras_internals
from keras_jamba.models._precision import check_trainable_dtypes


class TrainerHooks(_keras_internals.SymbolicBuildHook, _backend.trainer.TrainerLoops):
    """A model that checks the first batch of each `fit`, `evaluate` and `predict` on the host before any step.

    A model overrides `check_batch`. No data is lost, repeated or reordered, and no later step does more work.
    `train_on_batch`, `test_on_batch` and `predict_on_batch` check every batch.

    On PyTorch with a GPU, steps of `fit` and `train_on_batch` are captured as a CUDA graph: from the fourth step with
    inputs of the same shapes on, all but the optimizer's part is launched at once. Such a step runs no Python code.
    Steps stay as they are under `compile(run_eagerly=True)` or `jit_compile=True`; where a layer, a loss or a metric
    is neither Keras' nor ours; and where a step waits for the device.
    """

    def check_batch(self, x, y=None, sample_weight=None):
        """Raises a ValueError for a batch that the model cannot be trained, evaluated or run on; accepts all here.

        Args:
            x, y, sample_weight: one batch as the data gives it, NumPy arrays or tensors of the backend, or nested
                dicts, tuples and lists of them; y and sample_weight are None in `predict`, or where there are none.
        """

    @property
    def _inside_step(self):
        """Whether this thread is inside of a step of `fit`, `evaluate` or `predict`, or traces one."""
        return self._thread.inside

    @property
    def _thread(self):
        # Not by setattr, which Keras tracks. What is in here is not saved, and copies of the model have their own.
        found = self.__dict__.get("_trainer_threads")
        return self.__dict__.setdefault("_trainer_threads", _Thread(threading.Lock(), [])) if found is None else found

    def _this_loop(self):
        loops = self._thread.loops
        return loops[-1] if loops else None

    @contextlib.contextmanager
    def _loop(self, kind):
        thread, loop = self._thread, _backend.trainer.Loop(kind)
        if thread.loops:
            # A callback that evaluates: the loop around it has the newest values.
            thread.loops[-1].sync()
        thread.loops.append(loop)
        try:
            with self._alone(kind), loop:
                yield loop
        except UnboundLocalError as error:
            # Keras' predict without a batch.
            if loop.looked:
                raise
            raise _no_data(kind) from error
        finally:
            thread.loops.remove(loop)
        if not loop.looked and (loop.begun or kind in ("evaluate", "predict")):
            raise _no_data(kind)

    @contextlib.contextmanager
    def _alone(self, kind):
        """Refuses to train or evaluate in two threads, whose metrics, optimizer and weights would be mixed up."""
        lock, owners, here = *self._thread.shared, threading.get_ident()
        if kind in ("predict", "predict_on_batch"):
            yield
            return
        with lock:
            other = next((running for thread, running in owners if thread != here), None)
            if other is not None:
                raise RuntimeError(
                    "One thread at a time may train or evaluate a model; generate, stream and predict may run beside "
                    f"it. Received: {kind}, while another thread runs {other}. Wait for it, or use a copy of the model."
                )
            owners.append((here, kind))
        try:
            yield
        finally:
            owners.remove((here, kind))

    def _look(self, data):
        # A batch on an accelerator is copied to the host: once per loop.
        on_host = lambda x: _backend.sharding.to_numpy(x) if keras.ops.is_tensor(x) else x  # noqa: E731
        batch = keras.tree.map_structure(on_host, _backend.trainer.local_batch(data), none_is_leaf=False)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        if self._this_loop().kind == "predict":
            self.check_batch(x)
        else:
            self.check_batch(x, y, sample_weight)

    def _watched(self, function):
        """A step that looks at the batch it begins with, where it is the first of a loop."""

        def step(*given):
            thread, loop = self._thread, self._this_loop()
            if loop is not None and not loop.looked:
                given = _backend.trainer.first_batch(given, self._look, self.steps_per_execution)
                loop.looked = True
            before, thread.inside = thread.inside, True
            try:
                return function(*given)
            finally:
                thread.inside = before

        return step

    def _symbolic_build_data(self, iterator):
        """What Keras takes a batch from before the first step; it then begins again."""
        for begin, end, data in iterator:
            batches = data if isinstance(data, list) else list(itertools.islice(data, 1))
            if not batches:
                break
            self._look(batches[0])
            yield begin, end, batches if batches is data else iter(batches)
        raise _no_data(self._this_loop().kind)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args, **kwargs):
        with self._loop("fit"):
            return super().fit(*args, **kwargs)

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args, **kwargs):
        with self._loop("evaluate"):
            return super().evaluate(*args, **kwargs)

    @functools.wraps(keras.Model.predict)
    def predict(self, *args, **kwargs):
        with self._loop("predict"):
            return super().predict(*args, **kwargs)

    def reset_metrics(self):
        # Keras calls it when an epoch begins.
        if (loop := self._this_loop()) is not None:
            loop.begun = True
        super().reset_metrics()

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, x, y=None, sample_weight=None, *args, **kwargs):
        with self._loop("train_on_batch") as loop:
            self.check_batch(x, y, sample_weight)
            loop.looked = True
            return super().train_on_batch(x, y, sample_weight, *args, **kwargs)

    @functools.wraps(keras.Model.test_on_batch)
    def test_on_batch(self, x, y=None, sample_weight=None, *args, **kwargs):
        with self._loop("test_on_batch") as loop:
            self.check_batch(x, y, sample_weight)
            loop.looked = True
            return super().test_on_batch(x, y, sample_weight, *args, **kwargs)

    @functools.wraps(keras.Model.predict_on_batch)
    def predict_on_batch(self, x):
        with self._loop("predict_on_batch") as loop:
            self.check_batch(x)
            loop.looked = True
            return super().predict_on_batch(x)

    def make_train_function(self, force=False):
        self._check_is_split()
        check_trainable_dtypes(self)
        with self._thread.shared[0]:
            if self.train_function is None or force:
                super().make_train_function(force)
                self.train_function = self._watched(_backend.trainer.with_cuda_graph(self, self.train_function))
        return self.train_function

    def make_test_function(self, force=False):
        self._check_is_split()
        with self._thread.shared[0]:
            if self.test_function is None or force:
                super().make_test_function(force)
                self.test_function = self._watched(self.test_function)
        return self.test_function

    def make_predict_function(self, force=False):
        self._check_is_split()
        with self._thread.shared[0]:
            if self.predict_function is None or force:
                super().make_predict_function(force)
                self.predict_function = self._watched(self.predict_function)
        return self.predict_function

    def _check_is_split(self):
        if reason := _backend.sharding.why_not_sharded(self):
            raise RuntimeError(
                f"The weights of this model are whole on every device. Received: {reason}. Share batches by "
                "training.DataParallel instead, or split the model on JAX by training.layout_map."
            )


class _Thread(threading.local):
    """The loops of a model that run in one thread, the innermost last, and whether it is inside of a step.

    Shared by all threads are a lock, and who trains or evaluates: `[(thread, method)]`.
    """

    def __init__(self, *shared):
        self.loops, self.inside, self.shared = [], False, shared


def _no_data(kind):
    return ValueError(
        f"The data of {kind} must have at least one example. Received: none. Check how the data was read and selected."
    )

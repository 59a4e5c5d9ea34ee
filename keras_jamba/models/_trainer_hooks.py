"""What our models add to the loops of Keras: a check of the first batch, and steps that a backend makes faster."""

import contextlib
import functools
import threading

import keras

from keras_jamba import _backend
from keras_jamba.models._precision import check_trainable_dtypes


class TrainerHooks:
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
        return self.__dict__.setdefault("_trainer_threads", _Thread()) if found is None else found

    @contextlib.contextmanager
    def _loop(self, kind):
        loops = self._thread.loops
        loops.append(_Loop(kind))
        try:
            yield
        finally:
            loops.pop()

    def _look(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(_backend.local_batch(data))
        if self._thread.loops[-1].kind == "predict":
            self.check_batch(x)
        else:
            self.check_batch(x, y, sample_weight)

    def _watched(self, function):
        """A step that looks at the batch it begins with, where it is the first of a loop."""

        def step(*given):
            thread = self._thread
            loop = thread.loops[-1] if thread.loops else None
            if loop is not None and not loop.looked:
                given = _backend.first_batch(given, self._look, self.steps_per_execution)
                loop.looked = True
            before, thread.inside = thread.inside, True
            try:
                return function(*given)
            finally:
                thread.inside = before

        return step

    def _symbolic_build(self, iterator=None, data_batch=None):
        # Keras runs model, loss and metrics on the shapes of a batch before the first step.
        super()._symbolic_build(None if iterator is None else self._looked(iterator), data_batch)

    def _looked(self, iterator):
        for begin, end, data in iterator:
            batches = data if isinstance(data, list) else [next(data)]
            self._look(batches[0])
            yield begin, end, batches

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

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, x, y=None, sample_weight=None, *args, **kwargs):
        self.check_batch(x, y, sample_weight)
        return super().train_on_batch(x, y, sample_weight, *args, **kwargs)

    @functools.wraps(keras.Model.test_on_batch)
    def test_on_batch(self, x, y=None, sample_weight=None, *args, **kwargs):
        self.check_batch(x, y, sample_weight)
        return super().test_on_batch(x, y, sample_weight, *args, **kwargs)

    @functools.wraps(keras.Model.predict_on_batch)
    def predict_on_batch(self, x):
        self.check_batch(x)
        return super().predict_on_batch(x)

    def make_train_function(self, force=False):
        self._check_is_split()
        check_trainable_dtypes(self)
        if self.train_function is None or force:
            super().make_train_function(force)
            step = _backend.captured(self, self.train_function)
            self.train_function = _backend.keeping_weights(self, self._watched(step))
        return self.train_function

    def make_test_function(self, force=False):
        self._check_is_split()
        if self.test_function is None or force:
            super().make_test_function(force)
            self.test_function = _backend.keeping_weights(self, self._watched(self.test_function))
        return self.test_function

    def make_predict_function(self, force=False):
        self._check_is_split()
        if self.predict_function is None or force:
            super().make_predict_function(force)
            self.predict_function = _backend.keeping_weights(self, self._watched(self.predict_function))
        return self.predict_function

    def _check_is_split(self):
        if reason := _backend.why_whole(self):
            raise RuntimeError(
                f"The weights of this model are whole on every device. Received: {reason}. Share batches by "
                "training.DataParallel instead, or split the model on JAX by training.layout_map."
            )


class _Thread(threading.local):
    """The loops that are running in one thread, the innermost last, and whether it is inside of a step."""

    def __init__(self):
        self.loops, self.inside = [], False


class _Loop:
    def __init__(self, kind):
        self.kind, self.looked = kind, False

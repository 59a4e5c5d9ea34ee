"""The methods of models that train, evaluate and predict."""

from collections.abc import Callable
from typing import Any

import keras

from keras_jamba import _backend, _keras_internals
from keras_jamba._typing import Array, Tensors
from keras_jamba.models._documented import documented_by
from keras_jamba.models._precision import check_trainable_dtypes
from keras_jamba.models._training_loops import TrainingLoops, check_is_sharded


class TrainedModel(_keras_internals.SymbolicBuildHook, _backend.trainer.TrainerLoops, _keras_internals.Mixin):
    """Mixed into a `keras.Model`, before it in the bases.

    On PyTorch with a GPU, `fit` and `train_on_batch` capture their steps as a CUDA graph. From the fourth step with the
    same input shapes, one launch runs the step without Python code, except for the optimizer's part. Steps are not
    captured under `compile(run_eagerly=True)` or `jit_compile=True`, in a process group, with a layer, loss or metric
    from neither Keras nor keras_jamba, with another `train_step`, `compute_loss`, `compute_metrics` or `call` than the
    class's, and if a step synchronises with the device.
    """

    # Keras sets these attributes.
    train_function: Any
    test_function: Any
    predict_function: Any

    def check_batch(self, x: Tensors, y: Tensors | None = None, sample_weight: Tensors | None = None) -> None:
        """Raises ValueError for a batch that the model cannot train, evaluate or run on; the base accepts all.

        `fit`, `evaluate` and `predict` call it on the host for their first batch, before any step. The check never
        loses, repeats or reorders data. `train_on_batch`, `test_on_batch` and `predict_on_batch` call it for every
        batch.

        Args:
            x, y, sample_weight: one batch of the data: NumPy arrays or tensors of the backend, or nested dicts, tuples
                and lists of them. y and sample_weight are None in `predict` or if the data has none.
        """

    @property
    def _loops(self):
        return TrainingLoops.of(self)

    @property
    def _inside_step(self):
        """Whether this thread runs or traces a step of `fit`, `evaluate` or `predict`."""
        return self._loops.inside_step

    def _this_loop(self):
        return self._loops.innermost

    def _symbolic_build_data(self, iterator):
        return self._loops.checked_first_batches(self, iterator)

    @documented_by(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        with self._loops.run("fit"):
            return super().fit(*args, **kwargs)

    @documented_by(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._loops.run("evaluate"):
            return super().evaluate(*args, **kwargs)

    @documented_by(keras.Model.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Array:
        with self._loops.run("predict"):
            return super().predict(*args, **kwargs)

    @documented_by(keras.Model.train_on_batch)
    def train_on_batch(
        self, x: Tensors, y: Tensors | None = None, sample_weight: Tensors | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        with self._loops.run("train_on_batch") as loop:
            self.check_batch(x, y, sample_weight)
            loop.checked = True
            return super().train_on_batch(x, y, sample_weight, *args, **kwargs)

    @documented_by(keras.Model.test_on_batch)
    def test_on_batch(
        self, x: Tensors, y: Tensors | None = None, sample_weight: Tensors | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        with self._loops.run("test_on_batch") as loop:
            self.check_batch(x, y, sample_weight)
            loop.checked = True
            return super().test_on_batch(x, y, sample_weight, *args, **kwargs)

    @documented_by(keras.Model.predict_on_batch)
    def predict_on_batch(self, x: Tensors) -> Array:
        with self._loops.run("predict_on_batch") as loop:
            self.check_batch(x)
            loop.checked = True
            return super().predict_on_batch(x)

    def reset_metrics(self) -> None:
        # Keras calls this method at the start of an epoch.
        if (loop := self._this_loop()) is not None:
            loop.has_begun = True
        super().reset_metrics()

    def make_train_function(self, force: bool = False) -> Callable[..., Any]:
        check_is_sharded(self)
        check_trainable_dtypes(self)
        with self._loops.lock:
            if self.train_function is None or force:
                super().make_train_function(force)
                step = _backend.trainer.with_cuda_graph(self, self.train_function)
                self.train_function = self._loops.checked_step(self, step)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable[..., Any]:
        check_is_sharded(self)
        with self._loops.lock:
            if self.test_function is None or force:
                super().make_test_function(force)
                self.test_function = self._loops.checked_step(self, self.test_function)
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Callable[..., Any]:
        check_is_sharded(self)
        with self._loops.lock:
            if self.predict_function is None or force:
                super().make_predict_function(force)
                self.predict_function = self._loops.checked_step(self, self.predict_function)
        return self.predict_function

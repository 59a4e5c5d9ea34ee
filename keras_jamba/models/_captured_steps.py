"""Training steps that are launched as a whole."""

from keras_jamba import _backend
from keras_jamba.models._precision import check_trainable_dtypes


class CapturedSteps:
    """A model whose steps in `fit` and `train_on_batch` PyTorch captures as a CUDA graph, where there is a GPU.

    From the fourth step with inputs of the same shapes on, all but the optimizer's part is launched at once, as JAX and
    TensorFlow run compiled steps; like theirs such a step runs no Python code. Steps stay as they are under
    `compile(run_eagerly=True)` or `jit_compile=True`; where a layer, a loss or a metric is neither Keras' nor ours, for
    its code might do something else at each step; and where a step waits for the device.
    """

    def make_train_function(self, force=False):
        self._check_is_split()
        check_trainable_dtypes(self)
        if self.train_function is None or force:
            super().make_train_function(force)
            self.train_function = _backend.keeping_weights(self, _backend.captured(self, self.train_function))
        return self.train_function

    def make_test_function(self, force=False):
        self._check_is_split()
        if self.test_function is None or force:
            super().make_test_function(force)
            self.test_function = _backend.keeping_weights(self, self.test_function)
        return self.test_function

    def make_predict_function(self, force=False):
        self._check_is_split()
        if self.predict_function is None or force:
            super().make_predict_function(force)
            self.predict_function = _backend.keeping_weights(self, self.predict_function)
        return self.predict_function

    def _check_is_split(self):
        if reason := _backend.why_whole(self):
            raise RuntimeError(
                f"The weights of this model are whole on every device. Received: {reason}. Share batches by "
                "training.DataParallel instead, or split the model on JAX by training.layout_map."
            )

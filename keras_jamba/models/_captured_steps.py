"""Training steps that are launched as a whole."""

import keras

from keras_jamba import _backend


class CapturedSteps:
    """A model whose steps in `fit` and `train_on_batch` PyTorch captures as a CUDA graph, where there is a GPU.

    From the fourth step with inputs of the same shapes on, all but the optimizer's part is launched at once, as JAX and
    TensorFlow run compiled steps; like theirs such a step runs no Python code. Steps stay as they are under
    `compile(run_eagerly=True)` or `jit_compile=True`; where a layer, a loss or a metric is neither Keras' nor ours, for
    its code might do something else at each step; and where a step waits for the device.
    """

    def make_train_function(self, force=False):
        _check_weights_are_whole(self)
        if self.train_function is None or force:
            super().make_train_function(force)
            self.train_function = _backend.captured(self, self.train_function)
        return self.train_function


def _check_weights_are_whole(model):
    """Where a backend would let everyone believe that a model is split, and splits nothing."""
    backend = keras.backend.backend()
    if backend != "jax" and keras.distribution.distribution() is not None:
        raise RuntimeError(
            f"A keras.distribution splits models on JAX alone; on {backend} Keras looks at none. Received: "
            f"{type(keras.distribution.distribution()).__name__}. Share batches by training.DataParallel instead, or "
            "set KERAS_BACKEND to jax."
        )
    names = _backend.modules_in_parts(model)
    if names:
        raise RuntimeError(
            "A Keras model has its weights in Keras' variables, which stay whole and get no gradient when the "
            f"parameters of its modules are split. Received: {names[0]} of torch.distributed's fully_shard. Share "
            "batches by training.DataParallel instead, or split the model on JAX by training.layout_map."
        )

"""The loss of a language model."""

import contextlib
import threading

import keras
from keras import ops

_given = threading.local()


@contextlib.contextmanager
def given_token_losses():
    """A context in which the predictions that `TokenCrossentropy` gets are losses `(b, t)`, which it only reduces."""
    _given.token_losses = True
    try:
        yield
    finally:
        _given.token_losses = False


@keras.saving.register_keras_serializable(package="keras_jamba")
class TokenCrossentropy(keras.losses.SparseCategoricalCrossentropy):
    """Keras' sparse cross-entropy of logits `(b, t, v)`, computed on flattened rows `(b * t, v)`.

    Without flattening, PyTorch moves the classes to the second axis. That copies all logits, and their gradients too,
    and takes the softmax over strided memory.
    """

    def call(self, y_true, y_pred):
        if getattr(_given, "token_losses", False):
            return y_pred
        if len(y_true.shape) != 2 or len(y_pred.shape) != 3 or self.ignore_class is not None:
            return super().call(y_true, y_pred)
        rows = super().call(ops.reshape(y_true, (-1,)), ops.reshape(y_pred, (-1, y_pred.shape[-1])))
        return ops.reshape(rows, ops.shape(y_true))

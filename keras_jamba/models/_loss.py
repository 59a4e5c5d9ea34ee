"""The loss of a language model."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_jamba")
class TokenCrossentropy(keras.losses.SparseCategoricalCrossentropy):
    """Keras' sparse cross-entropy of logits `(b, t, v)`, computed on flattened rows `(b * t, v)`.

    Without flattening, PyTorch moves the classes to the second axis. That copies all logits, and their gradients too,
    and takes the softmax over strided memory.
    """

    def call(self, y_true, y_pred):
        if len(y_true.shape) != 2 or len(y_pred.shape) != 3 or self.ignore_class is not None:
            return super().call(y_true, y_pred)
        rows = super().call(ops.reshape(y_true, (-1,)), ops.reshape(y_pred, (-1, y_pred.shape[-1])))
        return ops.reshape(rows, ops.shape(y_true))

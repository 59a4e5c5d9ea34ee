"""The loss of a language model."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_jamba")
class TokenCrossentropy(keras.losses.SparseCategoricalCrossentropy):
    """Keras' own, of logits `(b, t, v)` as rows of classes, `(b * t, v)`.

    As they are, PyTorch would make a copy with the classes in the second place, as large as all logits, another for the
    gradient, and take the softmax over what lies far apart.
    """

    def call(self, y_true, y_pred):
        if len(y_true.shape) != 2 or len(y_pred.shape) != 3 or self.ignore_class is not None:
            return super().call(y_true, y_pred)
        rows = super().call(ops.reshape(y_true, (-1,)), ops.reshape(y_pred, (-1, y_pred.shape[-1])))
        return ops.reshape(rows, ops.shape(y_true))

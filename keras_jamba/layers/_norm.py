"""The norm of mixers, feed-forward parts and scans."""

import keras

from keras_jamba import _backend
from keras_jamba.layers._eager_fast_path import EagerFastPath


@keras.saving.register_keras_serializable(package="keras_jamba")
class RMSNorm(EagerFastPath, keras.layers.RMSNormalization):
    """`keras.layers.RMSNormalization` over the last axis, as one operation if the backend has one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # The norm is per token, but Keras' layer does not declare support for masks.
        self.supports_masking = True

    def call(self, x):
        return _backend.numerics.rms_norm(x, scale=_backend.tensors.as_tensor(self.scale), epsilon=self.epsilon)

    def after_addition(self, x, other):
        """Returns `x + other` and its norm."""
        if _backend.decoding.applies(x) and _backend.trainer.can_bypass_layer_call(self, x):
            found = _backend.decoding.added_norm(x, other, _backend.tensors.as_tensor(self.scale), self.epsilon)
            if found is not None:
                return found
        total = x + other
        return total, self(total)

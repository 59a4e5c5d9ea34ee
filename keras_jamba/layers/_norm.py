"""The norm of mixers, feed-forward parts and scans."""

import keras
from keras import ops

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
        return _backend.numerics.rms_norm(x, scale=ops.convert_to_tensor(self.scale), epsilon=self.epsilon)

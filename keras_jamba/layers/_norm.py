"""The norm before every mixer, feed-forward part and scan."""

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba.layers._eager_fast_path import EagerFastPath


@keras.saving.register_keras_serializable(package="keras_jamba")
class RMSNorm(EagerFastPath, keras.layers.RMSNormalization):
    """Keras' own over the last axis, in one operation where the backend has one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # It looks at one token at a time; Keras' own does not say so.
        self.supports_masking = True

    def call(self, x):
        return _backend.numerics.rms_norm(x, scale=ops.convert_to_tensor(self.scale), epsilon=self.epsilon)

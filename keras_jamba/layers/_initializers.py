"""How weights start: Xavier with a gain, and the two starts that Mamba cannot train well without."""

import math

import keras
from keras import ops

from keras_jamba import _backend


def xavier(gain=1.0):
    """Glorot's uniform initializer, its width multiplied by `gain`."""
    return keras.initializers.VarianceScaling(gain**2, mode="fan_avg", distribution="uniform")


def uniform(bound):
    return keras.initializers.RandomUniform(-bound, bound)


@keras.saving.register_keras_serializable(package="keras_jamba")
class TimeStepBias(keras.initializers.Initializer):
    """Biases whose softplus is log-uniform between two time steps (Gu and Dao 2023, section 3.6)."""

    def __init__(self, dt_min, dt_max):
        self.dt_min, self.dt_max = dt_min, dt_max

    def __call__(self, shape, dtype=None):
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        # Keras' generator stays on the mesh of a process' first distribution, and what it draws lies there.
        step = ops.exp(_backend.sharding.to_default_device(keras.random.uniform(shape, low, high, dtype="float32")))
        # The inverse of softplus, log(exp(step) - 1), without its cancellation.
        return ops.cast(step + ops.log(-ops.expm1(-step)), dtype or "float32")

    def get_config(self):
        return {"dt_min": self.dt_min, "dt_max": self.dt_max}


@keras.saving.register_keras_serializable(package="keras_jamba")
class StateIndexLog(keras.initializers.Initializer):
    """`log(1), log(2), ..., log(n)` in every row: A = -exp(A_log) starts as S4D-Real."""

    def __call__(self, shape, dtype=None):
        row = ops.log(ops.arange(1, shape[-1] + 1, dtype="float32"))
        # Not broadcast_to: on PyTorch that is a view, and optimizers write in place.
        return ops.cast(ops.ones(shape, "float32") * row, dtype or "float32")

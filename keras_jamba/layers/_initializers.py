"""Initializers: Xavier with a gain, and the two that Mamba needs to train well."""

import math

import keras
from keras import ops

from keras_jamba import _backend


def xavier(gain=1.0):
    """Returns Glorot's uniform initializer with its bound multiplied by `gain`."""
    return keras.initializers.VarianceScaling(gain**2, mode="fan_avg", distribution="uniform")


def uniform(bound):
    """Returns the uniform initializer from `-bound` to `bound`."""
    return keras.initializers.RandomUniform(-bound, bound)


@keras.saving.register_keras_serializable(package="keras_jamba")
class TimeStepBias(keras.initializers.Initializer):
    """Biases whose softplus is log-uniform between two time steps (Gu and Dao 2023, section 3.6)."""

    def __init__(self, dt_min, dt_max):
        self.dt_min, self.dt_max = dt_min, dt_max

    def __call__(self, shape, dtype=None):
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        # Keras' generator stays on the mesh of the first distribution of a process, and so do its draws.
        step = ops.exp(_backend.sharding.to_default_device(keras.random.uniform(shape, low, high, dtype="float32")))
        # The inverse of softplus, log(exp(step) - 1), without its cancellation.
        return ops.cast(step + ops.log(-ops.expm1(-step)), dtype or "float32")

    def get_config(self):
        return {"dt_min": self.dt_min, "dt_max": self.dt_max}


@keras.saving.register_keras_serializable(package="keras_jamba")
class StateIndexLog(keras.initializers.Initializer):
    """Rows of `log(1), log(2), ..., log(n)`, so that A = -exp(A_log) is initially S4D-Real."""

    def __call__(self, shape, dtype=None):
        row = ops.log(ops.arange(1, shape[-1] + 1, dtype="float32"))
        # PyTorch's broadcast_to returns a view, and optimizers write in place.
        return ops.cast(ops.ones(shape, "float32") * row, dtype or "float32")

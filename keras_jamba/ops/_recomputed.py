"""Functions whose insides are computed again for the gradient."""

import keras

from keras_jamba import _backend


def recomputed(function):
    """`keras.remat(function)`, or `function` itself where that would give wrong gradients."""
    return keras.remat(function) if _backend.can_recompute() else function

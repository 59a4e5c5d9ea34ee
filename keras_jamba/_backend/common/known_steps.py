"""Steps of models whose layers are all known."""

import keras

from keras_jamba import _keras_internals


def has_known_step(model):
    if not isinstance(model, keras.Model):
        return False
    kinds = [type(model).step, *(type(layer) for layer in _keras_internals.sublayers(model))]
    return all(kind.__module__.startswith(("keras.", "keras_jamba.")) for kind in kinds)

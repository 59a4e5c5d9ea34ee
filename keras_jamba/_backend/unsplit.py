"""What is said on backends where Keras splits no model, though it was asked to."""

import keras

splits_models = False


def parts():
    return None


def on_host(x):
    return keras.ops.convert_to_numpy(x)


def off_mesh(x):
    return x


def gathered(variable):
    return keras.ops.convert_to_tensor(variable)


def why_whole(model):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    backend = keras.backend.backend()
    return f"a {type(distribution).__name__} is active, at which Keras does not look on {backend}, only on JAX"


def pieces(variable):
    x = keras.ops.convert_to_numpy(variable)
    yield (0,) * x.ndim, x


def assign_pieces(variable, read):
    variable.assign(read((slice(None),) * len(variable.shape)))

"""Sharding on backends where Keras splits no tensors, even if a distribution is active."""

import keras

from keras_jamba import _backend
from keras_jamba._backend.common.unavailable import refuse

_NO_MESH = "Keras splits tensors among devices on JAX only"


def supports_model_parallel():
    return False


def active_mesh():
    return None


def why_not_sharded(model):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    backend = keras.backend.backend()
    return f"a {type(distribution).__name__} is active, which Keras ignores on {backend} and uses only on JAX"


def shard_map(function, tensors, split, results):
    refuse("shard_map", _NO_MESH, "active_mesh()")


def with_sharding_constraint(x, axes):
    refuse("with_sharding_constraint", _NO_MESH, "active_mesh()")


def all_gather_weight(variable):
    return _backend.tensors.as_tensor(variable)


def sharded_full(shape, value, dtype, axes):
    refuse("sharded_full", _NO_MESH, "active_mesh()")


def all_to_all(x, axis):
    refuse("all_to_all", _NO_MESH, "active_mesh()")


def pmax(x, axes):
    refuse("pmax", _NO_MESH, "active_mesh()")


def to_default_device(x):
    return x


def to_numpy(x):
    return keras.ops.convert_to_numpy(x)

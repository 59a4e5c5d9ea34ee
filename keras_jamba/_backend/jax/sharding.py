"""Meshes, local shards and collectives, on JAX."""

import jax
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from keras_jamba._backend.contract.devices import ActiveMesh
from keras_jamba._keras_internals import layout_map


def supports_model_parallel():
    return True


def active_mesh():
    distribution = keras.distribution.distribution()
    axes = getattr(layout_map(distribution), "active_mesh", None)
    if isinstance(distribution, keras.distribution.DataParallel):
        axes = distribution.batch_dim_name, None, False, None
    # Inside `shard_map` every tensor is a local shard already.
    if axes is None or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    if distribution.batch_dim_name != axes[0]:
        raise ValueError(
            "The first axis of the mesh of training.layout_map must split the rows. Received: "
            f"batch_dim_name={distribution.batch_dim_name!r} and a mesh with {axes[:2]}. Leave out batch_dim_name."
        )
    return ActiveMesh(distribution.device_mesh.backend_mesh, *axes)


def why_not_sharded(model):
    return None


def shard_map(function, tensors, split, results):
    given = {name: PartitionSpec(*axes) for name, axes in split.items()}
    found = tuple(PartitionSpec(*axes) for axes in results)
    # Without check_vma, because loops of Keras start with zeros, which declare no mesh axes that they vary over.
    return jax.shard_map(function, mesh=active_mesh().mesh, in_specs=(given,), out_specs=found, check_vma=False)(
        tensors
    )


def with_sharding_constraint(x, axes):
    return jax.lax.with_sharding_constraint(x, NamedSharding(active_mesh().mesh, PartitionSpec(*axes)))


def all_gather_weight(variable):
    mesh = active_mesh()
    if mesh is None or mesh.layouts_at_use is None:
        return keras.ops.convert_to_tensor(variable)
    layout = mesh.layouts_at_use[variable.path]
    # The stored layout first: otherwise XLA would gather the shards before rounding them to the compute dtype.
    stored = keras.distribution.distribution().get_variable_layout(variable)
    x = with_sharding_constraint(keras.ops.convert_to_tensor(variable), stored.axes)
    return with_sharding_constraint(x, layout.axes if layout else ())


def sharded_full(shape, value, dtype, axes):
    sharding = NamedSharding(active_mesh().mesh, PartitionSpec(*axes))
    return jax.jit(lambda: jax.numpy.full(shape, value, dtype), out_shardings=sharding)()


def all_to_all(x, axis):
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0)


def pmax(x, axes):
    return jax.lax.pmax(x, axes)


def to_default_device(x):
    return x if isinstance(x, jax.core.Tracer) else jax.numpy.asarray(np.asarray(x))


def to_numpy(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return keras.ops.convert_to_numpy(x)

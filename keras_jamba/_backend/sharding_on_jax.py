"""Operations on each device's part of their tensors on JAX, where XLA does not know how to split them itself."""

from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from jax.sharding import PartitionSpec

splits_models = True


class Parts(NamedTuple):
    """How the active distribution splits tensors.

    Attributes:
        mesh: of devices.
        batch, model: its axes, for rows and for the model; where only rows are shared model is None.
        sequence: whether tokens go over the model's axis where their channels or heads do not.
        at_use: where the axis for rows has parts of matrices too, a map of layouts without these; or None.
    """

    mesh: Any
    batch: str
    model: str
    sequence: bool
    at_use: Any

    def count(self, axis):
        return 1 if axis is None else self.mesh.shape[axis]


def parts():
    distribution = keras.distribution.distribution()
    told = getattr(getattr(distribution, "_layout_map", None), "parts", None)
    if isinstance(distribution, keras.distribution.DataParallel):
        told = distribution.batch_dim_name, None, False, None
    # Inside of a `shard_map` every tensor is a part already.
    if told is None or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    if distribution.batch_dim_name != told[0]:
        raise ValueError(
            "Rows go over the first axis of the mesh of training.layout_map. Received: "
            f"batch_dim_name={distribution.batch_dim_name!r} and a mesh with {told[:2]}. Leave it out."
        )
    return Parts(distribution.device_mesh.backend_mesh, *told)


def why_whole(model):
    return None


def on_parts(function, tensors, split, results):
    given = {name: PartitionSpec(*axes) for name, axes in split.items()}
    found = tuple(PartitionSpec(*axes) for axes in results)
    # Loops of Keras begin with zeros, which do not say over which axes they vary.
    return jax.shard_map(function, mesh=parts().mesh, in_specs=(given,), out_specs=tuple(found), check_vma=False)(
        tensors
    )


def constrained(x, axes):
    sharding = jax.sharding.NamedSharding(parts().mesh, PartitionSpec(*axes))
    return jax.lax.with_sharding_constraint(x, sharding)


def on_host(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return keras.ops.convert_to_numpy(x)


def off_mesh(x):
    return x if isinstance(x, jax.core.Tracer) else jax.numpy.asarray(np.asarray(x))


def gathered(variable):
    layouts = parts() and parts().at_use
    if layouts is None:
        return keras.ops.convert_to_tensor(variable)
    layout = layouts[variable.path]
    # First as it is stored, or XLA would fetch the parts before they are rounded to what is computed with.
    stored = keras.distribution.distribution().get_variable_layout(variable)
    x = constrained(keras.ops.convert_to_tensor(variable), stored.axes)
    return constrained(x, layout.axes if layout else ())


def filled(shape, value, dtype, axes):
    sharding = jax.sharding.NamedSharding(parts().mesh, PartitionSpec(*axes))
    return jax.jit(lambda: jax.numpy.full(shape, value, dtype), out_shardings=sharding)()


def exchanged(x, axis):
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0)


def largest(x, axis):
    return jax.lax.pmax(x, axis)


def pieces(variable):
    for shard in variable.value.addressable_shards:
        if shard.replica_id == 0:
            # What an array of an accelerator was on the host it keeps, and the variable its shards: hence another array
            # of the same memory.
            data = jax.make_array_from_single_device_arrays(shard.data.shape, shard.data.sharding, [shard.data])
            yield tuple(s.start or 0 for s in shard.index), np.asarray(data)


def assign_pieces(variable, read):
    value, found = variable.value, {}

    def part(index):
        key = tuple((s.start, s.stop) for s in index)
        if key not in found:
            found[key] = read(index).astype(value.dtype, copy=False)
        return found[key]

    variable.assign(jax.make_array_from_callback(value.shape, value.sharding, part))

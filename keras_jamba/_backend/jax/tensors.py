"""Platforms, values and shapes of tensors, on JAX."""

import jax
import numpy as np
from jax import numpy as jnp

from keras_jamba import _keras_internals
from keras_jamba._backend.common.exporting_state import exports_for_other_runtime
from keras_jamba._backend.common.tensors import (  # noqa: F401
    argsort,
    as_tensor,
    can_log,
    ensure_shape,
    has_values,
    is_floating,
    is_traced_by_torchscript,
    scatter_update,
    take_tokens,
)
from keras_jamba._backend.common.unavailable import refuse


def top_k(x, k):
    if not exports_for_other_runtime():
        return jax.lax.top_k(x, k)
    # TensorFlow cannot read JAX's operation.
    indices = jnp.argsort(-x, axis=-1)[..., :k]
    return jnp.take_along_axis(x, indices, axis=-1), indices


def platform(x=None):
    if x is None or isinstance(x, jax.core.Tracer):
        return jax.default_backend()
    (platform,) = {device.platform for device in x.devices()}
    return platform


def concrete_numpy(x):
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return None
    if any(device.platform != "cpu" for device in x.devices()):
        return None
    return np.asarray(x)


def needs_static_shapes():
    # Eager JAX also compiles, one operation at a time.
    return True


def why_no_split_rows():
    return "its shapes depend on the routing, but a compiler needs static shapes"


def split_rows(x, counts):
    refuse("split_rows", why_no_split_rows(), "why_no_split_rows()")


def block(x, index, size, axis):
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def add_to_block(x, update, index, axis):
    size = update.shape[axis]
    old = block(x, index, size, axis)
    return jax.lax.dynamic_update_slice_in_dim(x, old + update, index * size, axis)


def fill(variable, array):
    array, stored = array.astype(variable.dtype, copy=False), _keras_internals.stored_tensor(variable)
    # An array that is bound to no device, as that of a variable without a layout, works beside arrays on any device.
    place = stored.sharding if stored.committed else None
    on_cpu = any(device.platform == "cpu" for device in stored.sharding.device_set)
    if on_cpu:
        # An array on a CPU may share the memory of a contiguous NumPy array, here of a mapped file.
        is_shared = array.flags.c_contiguous or stored.sharding.num_devices > 1
        variable.assign(jax.device_put(np.array(array, order="C") if is_shared else array, place))
    elif stored.sharding.num_devices == 1 and array.ndim == 2 and array.T.flags.c_contiguous:
        # The device transposes faster than the host.
        variable.assign(jnp.transpose(jax.device_put(array.T, place)))
    else:
        variable.assign(jax.device_put(array, place))

"""Platforms, values and shapes of tensors, on TensorFlow."""

import keras
import tensorflow as tf

# No public function of TensorFlow tells whether XLA will compile the graph being traced.
from tensorflow.python.ops import control_flow_util

from keras_jamba._backend.common.tensors import (  # noqa: F401
    argsort,
    as_tensor,
    can_log,
    has_values,
    is_floating,
    is_traced_by_torchscript,
    scatter_update,
    take_tokens,
    top_k,
)


def platform(x=None):
    if x is not None and tf.executing_eagerly():
        return "cpu" if "CPU" in x.device else "gpu"
    return "gpu" if tf.config.list_logical_devices("GPU") else "cpu"


def concrete_numpy(x):
    return x.numpy() if hasattr(x, "numpy") and "CPU" in x.device else None


def needs_static_shapes():
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def ensure_shape(x, shape):
    return tf.ensure_shape(x, shape) if None in tuple(x.shape)[1:] else x


def why_no_split_rows():
    if needs_static_shapes():
        return "its shapes depend on the routing, but a compiler needs static shapes"
    return None


def split_rows(x, counts):
    return tf.split(x, counts, num=counts.shape[0])


def block(x, index, size, axis):
    # Not `tf.slice`: XLA makes its start a constant, and compiles anew for each value that the start depends on.
    sizes = x.shape[:axis] + (x.shape[axis] // size, size) + x.shape[axis + 1 :]
    return tf.gather(tf.reshape(x, [-1 if n is None else n for n in sizes]), index, axis=axis)


def add_to_block(x, update, index, axis):
    size = update.shape[axis]
    starts = [index * size if i == axis else 0 for i in range(len(x.shape))]
    return keras.ops.slice_update(x, starts, block(x, index, size, axis) + update)


def fill(variable, array):
    if array.ndim == 2 and array.T.flags.c_contiguous and not array.flags.c_contiguous:
        # TensorFlow transposes faster than NumPy.
        array = tf.transpose(tf.convert_to_tensor(array.T))
    variable.assign(array)

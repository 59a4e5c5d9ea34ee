"""The device and its random generators, on TensorFlow."""

import tensorflow as tf

from keras_jamba._backend.common.stateless_rng import get_rng_states, set_rng_states  # noqa: F401
from keras_jamba._backend.tensorflow.tensors import platform


def device_name():
    devices = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(devices[0]).get("device_name", "GPU") if devices else "CPU"


def device_memory():
    if platform() == "cpu":
        return {}
    stats = tf.config.experimental.get_memory_info("GPU:0")
    return {"device_memory": stats["current"], "device_memory_peak": stats["peak"]}


def start_profiler(folder):
    tf.profiler.experimental.start(str(folder))
    return tf.profiler.experimental.stop


def is_out_of_memory(error):
    return isinstance(error, (MemoryError, tf.errors.ResourceExhaustedError))

"""The device and its random generators, on JAX."""

import jax

from keras_jamba._backend.common.stateless_rng import get_rng_states, set_rng_states  # noqa: F401


def device_name():
    device = jax.devices()[0]
    return "CPU" if device.platform == "cpu" else device.device_kind


def device_memory():
    stats = jax.devices()[0].memory_stats() or {}
    names = {"device_memory": "bytes_in_use", "device_memory_peak": "peak_bytes_in_use"}
    return {name: stats[key] for name, key in names.items() if key in stats}


def start_profiler(folder):
    jax.profiler.start_trace(str(folder))
    return jax.profiler.stop_trace


def is_out_of_memory(error):
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

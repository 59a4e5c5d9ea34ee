"""The device and its random generators, on JAX."""

import jax


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


def get_rng_states():
    return []


def set_rng_states(states):
    pass

"""The functions of `_backend` on JAX."""

import itertools

import jax
import keras
import numpy as np

from keras_jamba._backend.grouped_on_jax import grouped_product, grouped_sum, why_not_grouped  # noqa: F401
from keras_jamba._backend.native_on_jax import native, register  # noqa: F401
from keras_jamba._backend.triton_on_jax import gpu, launched, why_not_here  # noqa: F401
from keras_jamba._backend.triton_on_jax import why_not_here as why_not_triton  # noqa: F401


def scan(body, carry, inputs, reverse=False):
    return jax.lax.scan(body, carry, inputs, reverse=reverse)


def custom_gradient(forward, backward, plain=None):
    @jax.custom_vjp
    def function(*tensors):
        return plain(*tensors) if plain else forward(*tensors)[0]

    # What is not wanted the compiler leaves out.
    function.defvjp(forward, lambda *given: tuple(g() if callable(g) else g for g in backward(*given)))
    # Outside of a caller's jit the loops would be traced anew at every call.
    return jax.jit(function)


def matmul_in_float32(x, y):
    return jax.numpy.matmul(x, y, preferred_element_type="float32")


def platform(x=None):
    if x is None or isinstance(x, jax.core.Tracer):
        return jax.default_backend()
    (platform,) = {device.platform for device in x.devices()}
    return platform


def host_values(x):
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return None
    if any(device.platform != "cpu" for device in x.devices()):
        return None
    return np.asarray(x)


def compiling():
    # Eager JAX compiles too, operation by operation.
    return True


def compiles():
    return True


def compiled(function):
    return jax.jit(function)


def inference(function, variables):
    @jax.jit
    def run(values, *args):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*args)

    return lambda *args: run([variable.value for variable in variables], *args)


def repeated(body, variables):
    def run(going, state):
        turn = lambda carry: body(carry[1])  # noqa: E731
        return jax.lax.while_loop(lambda carry: carry[0], turn, (going, state))[1]

    return inference(run, variables)


def recomputed(function):
    return jax.checkpoint(function)


def input_gradient(function, x):
    return jax.grad(function)(x)


register()


def why_not_native(shape):
    # What is lowered for another device, or to be exported, takes the portable form by itself.
    return None if all(isinstance(size, int) for size in shape) else "it needs sizes that are known"


def may_log():
    return True


def sum_over_replicas(tensors):
    return tensors


def device_name():
    device = jax.devices()[0]
    return "CPU" if device.platform == "cpu" else device.device_kind


def device_memory():
    told = jax.devices()[0].memory_stats() or {}
    names = {"device_memory": "bytes_in_use", "device_memory_peak": "peak_bytes_in_use"}
    return {name: told[key] for name, key in names.items() if key in told}


def start_trace(folder):
    jax.profiler.start_trace(str(folder))
    return jax.profiler.stop_trace


def out_of_memory(error):
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def random_states():
    return []


def set_random_states(states):
    pass


def process_index():
    return jax.process_index()


def process_count():
    return jax.process_count()


def of_all_processes(number):
    if process_count() == 1:
        return [number]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(number)).reshape(-1).tolist()


def weights_changed(layer):
    pass


def first_batch(given, look, steps):
    state, iterator = given
    first = next(iterator)
    look(first)
    return state, itertools.chain([first], iterator)

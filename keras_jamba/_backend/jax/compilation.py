"""Functions and loops that XLA compiles, on JAX."""

import jax
import keras

from keras_jamba._backend.common.exporting_state import exports, exports_for_other_runtime
from keras_jamba._backend.common.known_steps import has_known_step  # noqa: F401
from keras_jamba._backend.jax import _compilation_cache
from keras_jamba._backend.jax._loops import readable_values


def has_jit():
    return True


def jit(function):
    return jax.jit(function)


def jit_inference(function, variables):
    @jax.jit
    def run(values, *args):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*args)

    def on_values(*args):
        with readable_values(variables) as values:
            return run(values, *args)

    return on_values


def compiled_while_loop(body, variables, folds=False, overwrites=False):
    def run(going, state):
        step = lambda carry: body(carry[1])  # noqa: E731
        return jax.lax.while_loop(lambda carry: carry[0], step, (going, state))[1]

    compiled = jit_inference(run, variables)
    return lambda going, state, steps=None: compiled(going, state)


def has_fast_dynamic_loop():
    return jax.default_backend() == "cpu"


def is_exporting(shape):
    return exports() or needs_portable_operations(shape)


def needs_portable_operations(shape):
    return exports_for_other_runtime() or not all(size is None or isinstance(size, int) for size in shape)


def scan(body, carry, inputs, reverse=False, constants=()):
    step = (lambda carry, slices: body(carry, slices, *constants)) if constants else body
    return jax.lax.scan(step, carry, inputs, reverse=reverse)


def use_persistent_cache():
    _compilation_cache.check_setting()
    _compilation_cache.use()

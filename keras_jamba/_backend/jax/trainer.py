"""Trainer functions on JAX."""

import itertools

from keras_jamba._backend.common.trainer import (  # noqa: F401
    can_bypass_layer_call,
    has_call_hooks,
    local_batch,
    on_weights_replaced,
    runs_step_without_data,
    with_cuda_graph,
)
from keras_jamba._backend.jax._loops import Loop, TrainerLoops, readable_values  # noqa: F401


def first_batch(given, check, steps):
    state, iterator = given
    first = next(iterator)
    check(first)
    return state, itertools.chain([first], iterator)

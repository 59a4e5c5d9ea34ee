"""Eager functions and loops with a body traced once, on PyTorch."""

import torch
from torch.utils import _pytree

from keras_jamba._backend.torch._fx_tracing import with_fx_tracing


def has_jit():
    return False


def jit(function):
    # torch.compile takes many seconds and does not support Keras' scopes.
    return function


def jit_inference(function, variables):
    return torch.inference_mode()(function)


def compiled_while_loop(body, variables):
    body = with_fx_tracing(body, variables)

    def run(going, state):
        overwrite = False
        while going:
            going, state = body(state, overwrite=overwrite)
            # The state is the loop's own from now on.
            overwrite = True
        return state

    return run


def has_fast_dynamic_loop():
    return False


def scan(body, carry, inputs, reverse=False):
    leaves, structure = _pytree.tree_flatten(inputs)
    places = range(leaves[0].shape[0])
    found = []
    for i in reversed(places) if reverse else places:
        carry, outputs = body(carry, _pytree.tree_unflatten([x[i] for x in leaves], structure))
        found.append(outputs)
    found = found[::-1] if reverse else found
    return carry, _pytree.tree_map(lambda *each: torch.stack(each), *found)


def use_persistent_cache():
    pass

"""Eager functions and loops with a body traced once, on PyTorch."""

import warnings

import torch
from torch._higher_order_ops.scan import scan_op
from torch.utils import _pytree

from keras_jamba._backend.common.exporting_state import exports
from keras_jamba._backend.common.known_steps import has_known_step  # noqa: F401
from keras_jamba._backend.torch._fx_tracing import with_fx_tracing
from keras_jamba._backend.torch._graphed_loop import GraphedLoop


def is_exporting(shape):
    return exports() or needs_portable_operations(shape)


def needs_portable_operations(shape):
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def has_jit():
    return False


def jit(function):
    # torch.compile takes many seconds and does not support Keras' scopes.
    return function


def jit_inference(function, variables):
    return torch.inference_mode()(function)


def compiled_while_loop(body, variables, folds=False, overwrites=False):
    traced = with_fx_tracing(body, variables)

    def run_traced(going, state, steps):
        overwrite = False
        while going:
            going, state = traced(state, overwrite=overwrite)
            # The state is the loop's own from now on.
            overwrite = True
        return state

    loop = GraphedLoop(body, variables, folds, overwrites, run_traced)

    @torch.inference_mode()
    def run(going, state, steps=None):
        return loop(going, state, steps)

    return run


def has_fast_dynamic_loop():
    return False


def scan(body, carry, inputs, reverse=False, constants=()):
    if torch.compiler.is_exporting():
        return _exported_scan(body, carry, inputs, reverse, constants)
    leaves, structure = _pytree.tree_flatten(inputs)
    places = range(leaves[0].shape[0])
    found = []
    for i in reversed(places) if reverse else places:
        carry, outputs = body(carry, _pytree.tree_unflatten([x[i] for x in leaves], structure), *constants)
        found.append(outputs)
    found = found[::-1] if reverse else found
    return carry, _pytree.tree_map(lambda *each: torch.stack(each), *found)


def _exported_scan(body, carry, inputs, reverse, constants):
    # `torch._higher_order_ops.scan.scan` would compile the step, and reuse the sizes of an earlier export.
    carries, of_carry = _pytree.tree_flatten(carry)
    leaves, of_inputs = _pytree.tree_flatten(inputs)
    of_outputs = None

    def step(*tensors):
        nonlocal of_outputs
        first, last = len(carries), len(carries) + len(leaves)
        carry = _pytree.tree_unflatten(tensors[:first], of_carry)
        slices = _pytree.tree_unflatten(tensors[first:last], of_inputs)
        after, outputs = body(carry, slices, *tensors[last:])
        found, of_outputs = _pytree.tree_flatten(outputs)
        # The operator refuses an input, or a view of one.
        return [*map(torch.clone, _pytree.tree_leaves(after)), *found]

    leaves = [torch.flip(x, [0]) for x in leaves] if reverse else leaves
    with warnings.catch_warnings():
        # The operator looks for a gradient of each tensor that the step reads.
        warnings.filterwarnings("ignore", r".*\.grad attribute of a Tensor")
        # A copy of a constant outside of the graph is a tensor of the graph.
        found = scan_op(step, *(tuple(map(torch.clone, tensors)) for tensors in (carries, leaves, constants)))
    after, outputs = found[: len(carries)], found[len(carries) :]
    outputs = [torch.flip(x, [0]) for x in outputs] if reverse else outputs
    return _pytree.tree_unflatten(after, of_carry), _pytree.tree_unflatten(outputs, of_outputs)


def use_persistent_cache():
    pass

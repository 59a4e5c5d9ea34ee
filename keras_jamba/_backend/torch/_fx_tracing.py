"""Functions of tensors, traced into PyTorch operations that run without Keras' layers.

In a decoding step of one token, Python code above the operations takes five sixths of the time.
"""

import threading

import keras
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

_local = threading.local()
# `make_fx` patches functions of the process while it runs, and supports one trace at a time.
_lock = threading.Lock()


def is_tracing():
    """Returns whether a function is being traced. It must then not depend on the values of tensors."""
    return getattr(_local, "tracing", False)


def with_fx_tracing(function, variables):
    """Returns `run(*args, overwrite=False)`, which computes `function(*args)`.

    With `overwrite`, it may write results into the tensors of `args`.
    """
    variables, programs = list(variables), {}

    def run(*args, overwrite=False):
        leaves, structure = _pytree.tree_flatten(args)
        kind = structure, *((x.shape, x.dtype, x.device) for x in leaves)
        if kind not in programs:
            with _lock:
                if kind not in programs:
                    programs[kind] = _traced(function, variables, leaves, structure)
        if programs[kind] is None:
            return function(*args)
        program, parameters, result_structure, overwritten = programs[kind]
        if not (overwrite and _have_own_memory(leaves, overwritten)):
            leaves = [x.clone() if i in overwritten else x for i, x in enumerate(leaves)]
        return _pytree.tree_unflatten(program(*parameters, *leaves), result_structure)

    return torch.inference_mode()(run)


def _have_own_memory(leaves, places):
    """Returns whether the tensors at `places` share memory with no other tensor of `leaves`."""
    memory = [x.untyped_storage().data_ptr() for x in leaves]
    return all(memory.count(memory[i]) == 1 for i in places)


def _traced(function, variables, leaves, structure):
    """Returns `(program, parameters, structure of the result, overwritten)`.

    `program(*parameters, *leaves)` returns leaves. It writes into the leaves whose places are in `overwritten`.

    Returns None if the operations depend on the values of tensors, as those of a custom router may.
    """
    # Keras assigns in place, so these tensors are never replaced.
    parameters = [variable.value for variable in variables]
    found = {}

    def on_tensors(*tensors):
        values, leaves = tensors[: len(parameters)], tensors[len(parameters) :]
        with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
            result = function(*_pytree.tree_unflatten(leaves, structure))
        results, found["structure"] = _pytree.tree_flatten(result)
        return results

    _local.tracing = True
    try:
        # Fake tensors have no values, so reading one raises RuntimeError. Inference tensors cannot be traced; zeros of
        # the same shapes replace them.
        with torch.inference_mode(False), torch.no_grad():
            examples = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in leaves]
            program = make_fx(on_tensors, tracing_mode="fake")(*(value.detach() for value in parameters), *examples)
            _fold_constants(program)
            overwritten = _remove_copies(program, len(parameters))
    except RuntimeError:
        return None  # the untraced function raises any real error again
    finally:
        _local.tracing = False
    for node in program.graph.nodes:
        node.target = _FASTER_FUNCTIONS.get(node.target, node.target)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program.forward, parameters, found["structure"], overwritten


def _remove_copies(program, first):
    """Removes the copies of leaves that nothing else reads: a step of generation would copy each cache.

    The result at the place of the leaf must be the written copy. Then a loop that copies its first state writes only
    into its own memory: never into a tensor of its caller, a constant or a parameter.

    Args:
        program: the traced program.
        first: the number of inputs before the leaves.

    Returns:
        The set of the places of these leaves. The program writes into them.
    """
    overwritten = set()
    leaves = [node for node in program.graph.nodes if node.op == "placeholder"][first:]
    # The results of a loop's body are whether it goes on, and the leaves of the next call.
    results = next(node for node in program.graph.nodes if node.op == "output").args[0][-len(leaves) :]
    for place, (node, result) in enumerate(zip(leaves, results, strict=False)):
        (reader, *others) = [*node.users] or [None]
        if reader is None or others or reader.target is not torch.ops.aten.clone.default:
            continue
        writes = isinstance(result, torch.fx.Node) and result.target is torch.ops.aten.index_put_.default
        if len(results) != len(leaves) or not writes or result.args[0] is not reader:
            continue
        reader.replace_all_uses_with(node)
        program.graph.erase_node(reader)
        overwritten.add(place)
    return overwritten


def _fold_constants(program):
    """Computes the nodes that depend on no input, once."""
    values = {}
    for node in program.graph.nodes:
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False) and node.args[0] in values:
            return  # the program writes into this value, so it is not constant
        if node.op == "get_attr":
            values[node] = getattr(program, node.target)
        elif node.op == "call_function" and all(x in values for x in node.all_input_nodes):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for i, (node, value) in enumerate(values.items()):
        if node.op == "get_attr" or not isinstance(value, torch.Tensor):
            continue
        program.register_buffer(f"_constant_{i}", value)
        with program.graph.inserting_before(node):
            node.replace_all_uses_with(program.graph.get_attr(f"_constant_{i}"))


# PyTorch's Python functions take a microsecond less than the same operations in `torch.ops.aten`.
_aten = torch.ops.aten
_FASTER_FUNCTIONS = {
    _aten.add.Tensor: torch.add,
    _aten.mul.Tensor: torch.mul,
    _aten.sub.Tensor: torch.sub,
    _aten.mm.default: torch.mm,
    _aten.pow.Tensor_Scalar: torch.pow,
    _aten.rsqrt.default: torch.rsqrt,
    _aten.exp.default: torch.exp,
    _aten.neg.default: torch.neg,
    _aten.view.default: torch.Tensor.view,
    _aten._unsafe_view.default: torch.Tensor.view,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.add_.Scalar: torch.Tensor.add_,
    _aten.mean.dim: torch.mean,
}

"""ONNX, OpenVINO and `torch.export`, on PyTorch."""

import json
import logging
import warnings
from pathlib import Path

import torch
from torch.utils import _pytree

from keras_jamba._backend.common.exporting_state import exporting
from keras_jamba._backend.torch.tensors import as_tensor

# The extra file of a `.pt2` with the names of its inputs, in order.
_INPUTS = "inputs.json"
# Sizes of the example. Equal sizes would be one size of the graph, and PyTorch treats 0 and 1 as constants.
_FIRST_SIZE = 5
# Sizes at which the conditions of a graph must hold.
_TRIED_SIZES = (*range(1, 70), 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 65537, 10**6)


def formats():
    return tuple(_WRITERS)


def write(format, program, path, precision):
    _WRITERS[format](_exported(program), program, Path(path), precision)


def run(program, arrays):
    # Not `inference_mode`: variables that the first call creates would be inference tensors forever.
    with torch.no_grad(), exporting():
        outputs = program.function({name: as_tensor(torch.from_numpy(x)) for name, x in arrays.items()})
    return {name: x.cpu().numpy() for name, x in outputs.items()}


def load(format, path):
    extra = {_INPUTS: ""}
    graph = torch.export.load(path, extra_files=extra).module()
    names = json.loads(extra[_INPUTS])

    def run(arrays):
        with torch.inference_mode():
            outputs = graph(*(as_tensor(torch.from_numpy(arrays[name])) for name in names))
        return {name: x.cpu().numpy() for name, x in outputs.items()}

    return run


class _Module(torch.nn.Module):
    def __init__(self, program):
        super().__init__()
        self.model, self.program = program.model, program

    def forward(self, *tensors):
        outputs = self.program.function(dict(zip(self.program.inputs, tensors, strict=True)))
        # A graph cannot return an input or one tensor twice.
        return {name: x.clone() for name, x in outputs.items()}


def _exported(program):
    sizes = {name: _FIRST_SIZE + 2 * i for i, name in enumerate(program.sizes())}
    dims = {name: torch.export.Dim(name) for name in sizes}
    shapes = tuple({i: dims[s] for i, s in enumerate(x.shape) if s in dims} for x in program.inputs.values())
    arrays = tuple(as_tensor(torch.from_numpy(x)) for x in program.example(sizes).values())
    module = _Module(program).eval()
    with torch.no_grad():
        # PyTorch cannot prove some conditions that hold for all sizes, such as 8 (s + 64) <= 16 (s + 64).
        asserts = dict(prefer_deferred_runtime_asserts_over_guards=True)
        return torch.export.export(module, arrays, dynamic_shapes=(shapes,), **asserts)


def _write_torch(exported, program, path, precision):
    torch.export.save(exported, path, extra_files={_INPUTS: json.dumps(list(program.inputs))})


def _write_onnx(exported, program, path, precision):
    _check_conditions(exported, program)
    names = dict(input_names=list(program.inputs), output_names=_output_names(exported))
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            found = torch.onnx.export(exported, (), dynamo=True, verbose=False, **names)
        finally:
            logger.setLevel(level)
    _name_sizes(found.model.graph, program)
    found.save(str(path), external_data=False)


def _check_conditions(exported, program):
    """Raises an error if the graph holds at some sizes only. ONNX drops the conditions that `torch.export` keeps."""
    for node in exported.graph.nodes:
        if node.op != "call_function" or "_assert_scalar" not in str(node.target):
            continue
        condition = getattr(getattr(node.args[0].meta.get("val"), "node", None), "expr", None)
        if condition is None or not all(_holds(condition, size) for size in _TRIED_SIZES):
            raise ValueError(f"the graph is valid only where {condition}")


def _holds(condition, size):
    """Returns whether a condition on sizes holds where each is `size` or a little more."""
    symbols = sorted(condition.free_symbols, key=str)
    shifts = ([0] * len(symbols), range(len(symbols)), range(len(symbols), 0, -1))
    return all(condition.subs(dict(zip(symbols, (size + i for i in shift), strict=True))) == True for shift in shifts)  # noqa: E712


def _output_names(exported):
    outputs = exported.call_spec.out_spec
    return list(_pytree.tree_unflatten([None] * outputs.num_leaves, outputs))


def _name_sizes(graph, program):
    """Gives the open sizes of an ONNX graph their names in the program."""
    names = {}
    for value, given in zip(graph.inputs, program.inputs.values(), strict=True):
        pairs = zip(value.shape, given.shape, strict=True)
        names |= {str(found): size for found, size in pairs if isinstance(size, str)}
    for value in (*graph.inputs, *graph.outputs):
        for axis, size in enumerate(value.shape):
            if str(size) in names:
                value.shape[axis] = names[str(size)]


def _write_openvino(exported, program, path, precision):
    import openvino

    file = path.with_suffix(".onnx")
    try:
        _write_onnx(exported, program, file, precision)
        model = openvino.convert_model(str(file))
        openvino.save_model(model, str(path), compress_to_fp16=precision == "float16")
    finally:
        file.unlink(missing_ok=True)


_WRITERS = {"torch": _write_torch, "onnx": _write_onnx, "openvino": _write_openvino}

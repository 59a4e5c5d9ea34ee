"""Programs to export: functions of named tensors, with open sizes, over the weights of a model."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import keras
import numpy as np
from keras import ops, tree

from keras_jamba.models import DHCJamba, JambaCausalLM
from keras_jamba.models._text_model import TextModel

BATCH, LENGTH = "batch", "length"


class Input(NamedTuple):
    """Shape and dtype of an input. Names in the shape are open sizes; equal names are equal sizes."""

    shape: tuple
    dtype: str


@dataclass
class Program:
    """A function to export.

    Attributes:
        model: the layer whose weights the function reads.
        function: `function({name: tensor})` returns `{name: tensor}`.
        inputs: `{name: Input}`.
        limits: `{name of an integer input: (lowest, highest + 1)}`, the valid values.
        ranges: `{name of a float input: (lowest, highest)}`; standard normal numbers otherwise.
        state: names of the inputs that are the state of a stream. The output `"next_" + name` is the next state.
        capacity: the most tokens of a stream, or None.
        empty_state: `empty_state(batch size)` returns the state `{name: tensor}` before a stream.
    """

    model: keras.Layer
    function: Callable
    inputs: dict[str, Input]
    limits: dict = field(default_factory=dict)
    ranges: dict = field(default_factory=dict)
    state: tuple[str, ...] = ()
    capacity: int | None = None
    empty_state: Callable | None = None

    def sizes(self):
        """Returns the names of the open sizes, in the order of the inputs."""
        return list(dict.fromkeys(size for x in self.inputs.values() for size in x.shape if isinstance(size, str)))

    def example(self, sizes, seed=0):
        """Returns `{name: array}` of random inputs; zeros for a state."""
        rng = np.random.default_rng(seed)
        return {name: self._drawn(rng, name, *x, sizes) for name, x in self.inputs.items()}

    def _drawn(self, rng, name, shape, dtype, sizes):
        shape = tuple(sizes.get(size, size) for size in shape)
        if name in self.state:
            return np.zeros(shape, dtype)
        if dtype == "bool":
            drawn = rng.random(shape) < 0.7
            if len(shape) > 1:
                drawn[:, 0] = True  # some models refuse a row without any real token
            return drawn
        if dtype.startswith(("int", "uint")):
            return rng.integers(*self.limits.get(name, (0, 2)), shape).astype(dtype)
        if name in self.ranges:
            return rng.uniform(*self.ranges[name], shape).astype(dtype)
        return rng.standard_normal(shape).astype(dtype)


# Calls


def call_program(model, batch_size, length, input_signature):
    """Returns the `Program` of a call of the model, in inference."""
    signature = _signature_of(model) if input_signature is None else input_signature
    names = _names_of(signature)
    inputs = {}
    for name, (_, leaf) in zip(names, tree.flatten_with_path(signature), strict=True):
        shape, dtype = _checked_spec(name, leaf)
        inputs[name] = Input(_named_sizes(name, shape, batch_size, length), dtype)
    _check_fixed(inputs, batch_size, length)
    inference = {"training": False} if "training" in inspect.signature(model.call).parameters else {}

    def function(tensors):
        given = tree.pack_sequence_as(signature, [tensors[name] for name in names])
        outputs = named_outputs(model(given, **inference))
        _check_distinct("inputs and outputs", [*names, *outputs])
        return outputs

    program = Program(model, function, inputs)
    if isinstance(model, TextModel):
        program.limits = {name: (0, model.get_config()["vocab_size"]) for name in inputs if name == "token_ids"}
    elif isinstance(model, DHCJamba):
        program.limits, program.ranges = _image_values(model, names[0])
    return program


def _check_fixed(inputs, batch_size, length):
    """Raises ValueError for a given size that no input has."""
    for name, value in {"batch_size": batch_size, "length": length}.items():
        axis = int(name == "length")
        if value is not None and not any(len(x.shape) > axis and x.shape[axis] == value for x in inputs.values()):
            raise ValueError(
                f"{name} fixes an open axis {axis} of an input. Received: {name}={value} for the shapes "
                f"{[x.shape for x in inputs.values()]}. Remove it."
            )


def _signature_of(model):
    if isinstance(model, TextModel):
        return {"token_ids": keras.InputSpec(shape=(None, None), dtype="int32")}
    if getattr(model, "inputs", None):
        # The structure that a functional model was given.
        return model.inputs if isinstance(model, keras.Sequential) else model.input
    raise ValueError(
        "input_signature is required for a layer or model that does not define its inputs. Received: "
        f"{type(model).__name__}. Pass input_signature=keras.InputSpec(shape=(None, None, 64), dtype='float32'), for "
        "example."
    )


def _names_of(signature):
    """Returns one name per leaf of a signature: the keys of dicts, the names of Keras inputs, or input_0, ..."""
    paths = tree.flatten_with_path(signature)
    names = []
    for i, (path, leaf) in enumerate(paths):
        named = "_".join(map(str, path)) if path and isinstance(path[-1], str) else None
        name = named or getattr(leaf, "name", None) or ("input" if len(paths) == 1 else f"input_{i}")
        names.append(identifier(name))
    _check_distinct("inputs", names)
    return names


def identifier(name):
    """Returns a name as an identifier, which every format accepts."""
    name = re.sub(r"\W", "_", str(name))
    return f"_{name}" if name[:1].isdigit() else name


def _checked_spec(name, leaf):
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or len(shape) == 0:
        raise ValueError(
            "Each entry of input_signature needs a shape with a batch axis. Received: "
            f"{leaf!r} for {name!r}. Pass keras.InputSpec(shape=(None, ...), dtype=...)."
        )
    return tuple(shape), keras.backend.standardize_dtype(dtype or "float32")


def _named_sizes(name, shape, batch_size, length):
    def size(axis, size):
        if size is not None:
            return int(size)
        if axis == 0:
            return BATCH if batch_size is None else batch_size
        if axis == 1:
            return LENGTH if length is None else length
        return f"{name}_{axis}"

    return tuple(size(*each) for each in enumerate(shape))


def named_outputs(outputs):
    """Returns the tensors of nested outputs as `{name: tensor}`; a single tensor is called `output`."""
    paths = tree.flatten_with_path(outputs)
    if len(paths) == 1 and not paths[0][0]:
        return {"output": outputs}
    prefix = lambda path: "output_" if isinstance(path[0], int) else ""  # noqa: E731
    names = [identifier(prefix(path) + "_".join(map(str, path))) for path, _ in paths]
    _check_distinct("outputs", names)
    return dict(zip(names, (leaf for _, leaf in paths), strict=True))


def _check_distinct(kind, names):
    if len(set(names)) < len(names):
        raise ValueError(f"The names of the {kind} must differ. Received: {names}. Rename one of them.")


def _image_values(model, name):
    """Returns `(limits, ranges)` of the images of a model."""
    if model.pixel_range is None:
        return {}, {}
    low, high = model.pixel_range
    return {name: (int(low), int(high) + 1)}, {name: (low, high)}


# Streams


def stream_program(model, batch_size, length, capacity):
    """Returns the `Program` of one step of a stream, whose state is among the inputs and outputs."""
    if not isinstance(model, DHCJamba | JambaCausalLM):
        raise ValueError(
            "streaming=True is for DHCJamba models of clips and for JambaCausalLM. Received: "
            f"{type(model).__name__}. Export the call instead."
        )
    if length is not None and isinstance(model, DHCJamba):
        raise ValueError(f"A step of a stream takes one frame. Received: length={length}. Remove it.")
    structure = _state_structure(model, capacity)
    batch = BATCH if batch_size is None else batch_size
    named = {f"state_{name}": x for name, x in named_outputs(structure).items()}
    # Every tensor of a state begins with the batch axis.
    state = {name: Input((batch, *x.shape[1:]), keras.backend.standardize_dtype(x.dtype)) for name, x in named.items()}

    def empty_state(rows):
        return {f"state_{name}": x for name, x in named_outputs(model.init_cache(rows, capacity)).items()}

    if isinstance(model, DHCJamba):
        shape = model.input_shape[2:]
        first = {"frame": Input((batch, *_named_sizes("frame", (1, 1, *shape), 1, 1)[2:]), "float32")}
    else:
        first = {"token_ids": Input((batch, LENGTH if length is None else length), "int32")}
    inputs = first | {"reset": Input((batch,), "bool")} | state

    def function(tensors):
        cache = tree.pack_sequence_as(structure, [tensors[name] for name in state])
        outputs, cache = _step(model, tensors, cache)
        names = [f"next_{name}" for name in state]
        return {"logits": outputs} | dict(zip(names, tree.flatten(cache), strict=True))

    program = Program(model, function, inputs, state=tuple(state), capacity=capacity, empty_state=empty_state)
    if isinstance(model, DHCJamba):
        program.limits, program.ranges = _image_values(model, "frame")
    else:
        program.limits = {"token_ids": (0, model.get_config()["vocab_size"])}
    return program


def _state_structure(model, capacity):
    try:
        return model.init_cache(1, capacity)
    except ValueError as error:
        if capacity is not None:
            raise
        model.init_cache(1, 1)  # raises the model's own error if it cannot stream
        raise ValueError(
            "streaming=True needs capacity, the most tokens or frames of a stream, for attention without a window. "
            f"Received: capacity=None. Pass capacity=1024, for example. ({error})"
        ) from error


def _step(model, tensors, cache):
    if isinstance(model, DHCJamba):
        return model.step(tensors["frame"], cache, reset_mask=tensors["reset"])
    ids, reset = tensors["token_ids"], tensors["reset"]
    first = ops.cumsum(ops.ones_like(ids), axis=1) == 1
    given = {"token_ids": ids, "reset_mask": ops.logical_and(ops.expand_dims(reset, 1), first)}
    return model.step(given, cache, logits_to_keep=1)

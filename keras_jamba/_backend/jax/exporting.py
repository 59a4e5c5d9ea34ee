"""`jax.export` and TensorFlow's SavedModel, on JAX."""

from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_jamba._backend.common import saved_model
from keras_jamba._backend.common.exporting_state import exporting


def formats():
    return tuple(_WRITERS)


def write(format, program, path, precision):
    with exporting(for_other_runtime=True):
        _WRITERS[format](program, Path(path))


def run(program, arrays):
    with exporting():
        outputs = program.function({name: jnp.asarray(x) for name, x in arrays.items()})
    return {name: np.asarray(x) for name, x in outputs.items()}


def load(format, path):
    if format == "tf_saved_model":
        return saved_model.load(path)
    graph = jax.export.deserialize(bytearray(Path(path).read_bytes()))
    return lambda arrays: {name: np.asarray(x) for name, x in graph.call(arrays).items()}


def _write_jax_export(program, path):
    sizes = program.sizes()
    symbols = dict(zip(sizes, jax.export.symbolic_shape(", ".join(sizes)), strict=True)) if sizes else {}
    shapes = {name: tuple(symbols.get(size, size) for size in x.shape) for name, x in program.inputs.items()}
    specs = {name: jax.ShapeDtypeStruct(shape, program.inputs[name].dtype) for name, shape in shapes.items()}
    variables = program.model.variables
    values = [v.value for v in variables]

    def function(tensors):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return program.function(tensors)

    exported = jax.export.export(jax.jit(function))(specs)
    path.write_bytes(exported.serialize())


def _write_saved_model(program, path):
    named = lambda shape: "(" + ", ".join(map(str, shape)) + ")"  # noqa: E731
    shapes = {name: named(x.shape) for name, x in program.inputs.items()}
    saved_model.write(program, path, jax2tf_kwargs=dict(native_serialization=True, polymorphic_shapes=[shapes]))


_WRITERS = {"jax_export": _write_jax_export, "tf_saved_model": _write_saved_model}

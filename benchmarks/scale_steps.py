"""Models of any size without their weights, and their steps lowered for a mesh, on JAX."""

import contextlib

import jax
import keras
from jax.sharding import NamedSharding, PartitionSpec

import keras_jamba
from keras_jamba import training

AXES = ("batch", "model")
DTYPES = {"training": "mixed_bfloat16", "decoding": "bfloat16"}
_OF_KERAS = "_initialize_with_initializer"


def distribution(shape, layout):
    mesh = keras.distribution.DeviceMesh(shape, AXES, keras.distribution.list_devices("cpu"))
    return keras.distribution.ModelParallel(layout_map=training.layout_map(mesh, **layout))


@contextlib.contextmanager
def _without_drawing():
    """Variables that begin with zeros: Keras draws no random numbers while JAX traces."""
    variable = keras.Variable
    drawing = getattr(variable, _OF_KERAS)

    def zeros(self, initializer):
        self._initialize_layout()
        self._value = jax.numpy.zeros(self._shape, self._dtype)

    setattr(variable, _OF_KERAS, zeros)
    try:
        yield
    finally:
        setattr(variable, _OF_KERAS, drawing)


def model(config, kind, batch=None, checkpointing=False):
    """A `JambaCausalLM` whose variables are shapes, each with the sharding of its layout where there is a distribution.

    Args:
        config: its constructor arguments.
        kind: "training", and it has an optimizer, or "decoding".
        batch: `(rows, tokens)` of a training step.
        checkpointing: whether blocks are computed again for the gradient.
    """
    made = []

    def build():
        made.append(keras_jamba.JambaCausalLM(**config, dtype=DTYPES[kind], gradient_checkpointing=checkpointing))
        if kind == "training":
            made[0].compile(training.optimizer(made[0], steps=1000))
            tokens = jax.numpy.zeros(batch, "int32")
            made[0]._symbolic_build(data_batch=(tokens, tokens))
        return ()

    with _without_drawing():
        jax.eval_shape(build)
    for variable in everything(made[0]):
        layout = variable._layout
        sharding = None if layout is None else layout.backend_layout
        variable._value = jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)
    return made[0]


def everything(model):
    optimizer = getattr(model, "optimizer", None)
    return [*model.variables, *(optimizer.variables if optimizer else []), *model.metrics_variables]


def groups(model):
    """Variables by what they are for; gradients are like what they are of."""
    optimizer = getattr(model, "optimizer", None)
    found = {"weights": model.variables}
    if optimizer is not None:
        found |= {"gradients": model.trainable_variables, "optimizer": optimizer.variables}
    return found


def cache(model, rows, room):
    return jax.eval_shape(lambda: model.init_cache(rows, room))


def lowered(model, kind, rows, length):
    """The step that `fit` takes, or that `generate` takes for a token, lowered for the active distribution.

    Args:
        rows, length: of the batch; of decoding, the tokens that the cache has room for.
    """
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    if kind == "training":
        by_rows = NamedSharding(mesh, PartitionSpec(AXES[0]))
        tokens = jax.ShapeDtypeStruct((rows, length), "int32", sharding=by_rows)
        state = _state(model)
        step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, model._get_state_sharding_spec()))
        return step.lower(state, (tokens, tokens))
    variables = model.variables

    def step(values, tokens, cache):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            logits, cache = model.step({"token_ids": tokens}, cache)
        return keras.ops.argmax(logits[:, -1], axis=-1), cache

    # XLA lays the cache as `init_cache` does; scale.py compares it with what it counts.
    given = jax.ShapeDtypeStruct((rows, 1), "int32"), cache(model, rows, length)
    return jax.jit(step, donate_argnums=2).lower([v._value for v in variables], *given)


def _state(model):
    names = ("trainable_variables", "non_trainable_variables")
    owners = [*((model, name) for name in names), (model.optimizer, "variables"), (model, "metrics_variables")]
    return tuple([v._value for v in getattr(owner, name)] for owner, name in owners)


def bytes_where_laid(structs):
    """Bytes of one device's parts of shapes or arrays with shardings."""
    return sum(part_of(x.sharding, x.shape, x.dtype) for x in jax.tree.leaves(structs))


def part_of(sharding, shape, dtype):
    part = sharding.shard_shape(tuple(shape))
    size = jax.numpy.dtype(dtype).itemsize
    for length in part:
        size *= length
    return size

"""Models without weights, and their steps lowered for a mesh, on JAX."""

import contextlib

import jax
import keras
from jax.sharding import NamedSharding, PartitionSpec

import keras_jamba
from keras_jamba import training

AXES = ("batch", "model")
DTYPES = {"training": "mixed_bfloat16", "decoding": "bfloat16"}
_KERAS_INITIALIZER = "_initialize_with_initializer"


def distribution(shape, layout):
    mesh = keras.distribution.DeviceMesh(shape, AXES, keras.distribution.list_devices("cpu"))
    return keras.distribution.ModelParallel(layout_map=training.layout_map(mesh, **layout))


@contextlib.contextmanager
def _zero_initialization():
    """Initialises variables with zeros inside the context, because Keras draws no random numbers while JAX traces."""
    variable = keras.Variable
    original = getattr(variable, _KERAS_INITIALIZER)

    def zeros(self, initializer):
        self._initialize_layout()
        self._value = jax.numpy.zeros(self._shape, self._dtype)

    setattr(variable, _KERAS_INITIALIZER, zeros)
    try:
        yield
    finally:
        setattr(variable, _KERAS_INITIALIZER, original)


def model(config, kind, batch=None, checkpointing=False):
    """Returns a `JambaCausalLM` whose variables are shapes, with the shardings of the active distribution if any.

    Args:
        config: constructor arguments of the model.
        kind: "training", with an optimizer, or "decoding".
        batch: `(rows, tokens)` of a training step.
        checkpointing: whether the backward pass recomputes blocks.
    """
    models = []

    def build():
        models.append(keras_jamba.JambaCausalLM(**config, dtype=DTYPES[kind], gradient_checkpointing=checkpointing))
        if kind == "training":
            models[0].compile(training.optimizer(models[0], steps=1000))
            tokens = jax.numpy.zeros(batch, "int32")
            models[0]._symbolic_build(data_batch=(tokens, tokens))
        return ()

    with _zero_initialization():
        jax.eval_shape(build)
    for variable in all_variables(models[0]):
        layout = variable._layout
        sharding = None if layout is None else layout.backend_layout
        variable._value = jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)
    return models[0]


def all_variables(model):
    optimizer = getattr(model, "optimizer", None)
    return [*model.variables, *(optimizer.variables if optimizer else []), *model.metrics_variables]


def groups(model):
    """Returns variables by purpose. Gradients have the shapes and layouts of their weights."""
    optimizer = getattr(model, "optimizer", None)
    found = {"weights": model.variables}
    if optimizer is not None:
        found |= {"gradients": model.trainable_variables, "optimizer": optimizer.variables}
    return found


def cache(model, rows, capacity):
    return jax.eval_shape(lambda: model.init_cache(rows, capacity))


def lowered(model, kind, rows, length):
    """Returns the step of `fit`, or the step per token of `generate`, lowered for the active distribution.

    Args:
        rows, length: shape of the training batch. For decoding, `length` is the capacity of the cache in tokens.
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

    # XLA shards the cache as `init_cache` does. `scaling.scale` compares it with the computed bytes.
    given = jax.ShapeDtypeStruct((rows, 1), "int32"), cache(model, rows, length)
    return jax.jit(step, donate_argnums=2).lower([v._value for v in variables], *given)


def _state(model):
    names = ("trainable_variables", "non_trainable_variables")
    owners = [*((model, name) for name in names), (model.optimizer, "variables"), (model, "metrics_variables")]
    return tuple([v._value for v in getattr(owner, name)] for owner, name in owners)


def local_bytes(structs):
    """Returns the bytes of the shards on one device, for shapes or arrays with shardings."""
    return sum(shard_bytes(x.sharding, x.shape, x.dtype) for x in jax.tree.leaves(structs))


def shard_bytes(sharding, shape, dtype):
    local_shape = sharding.shard_shape(tuple(shape))
    size = jax.numpy.dtype(dtype).itemsize
    for length in local_shape:
        size *= length
    return size

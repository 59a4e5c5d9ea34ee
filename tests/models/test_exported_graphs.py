"""Graphs of `torch.export` and `jax.export` with open batch and length give the model's numbers at every size."""

import keras
import numpy as np
import pytest
from checks import close, full, numpy
from keras import ops

import keras_jamba
from keras_jamba.layers import AttentionLayer, GatedConvLayer, MambaLayer, MoELayer
from keras_jamba.ops import selective_scan

D = 16
# JAX compiles the reference at each size.
ON_JAX = keras.backend.backend() == "jax"
SIZES = [(1, 1), (2, 65)] if ON_JAX else [(1, 1), (1, 64), (3, 7), (2, 257)]
WINDOW = dict(attention_window=4, attention_sinks=1)
MODELS = {
    "mamba": lambda: MambaLayer(D, d_state=4, mixer_rms_norm=True),
    "gated convolution": lambda: GatedConvLayer(D),
    "attention": lambda: AttentionLayer(D, num_heads=2, num_kv_heads=1),
    "window": lambda: AttentionLayer(D, num_heads=2, num_kv_heads=1, use_rope=False, **WINDOW),
    "experts": lambda: MoELayer(D, num_experts=8, num_experts_per_token=2, d_ff=12),
    "language model": lambda: keras_jamba.JambaCausalLM(
        32, d_model=D, num_layers=4, mamba_ratio=1, num_heads=2, moe_frequency=2, num_experts=4
    ),
}
pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="of torch.export and jax.export; runs on torch and jax"
)


def inputs(kind, batch, length):
    rng = np.random.default_rng(batch + length)
    if kind == "language model":
        return rng.integers(0, 32, (batch, length)).astype("int32")
    return rng.standard_normal((batch, length, D)).astype("float32")


def documents(batch, length):
    """Returns a mask with padding, and ids of several documents."""
    rng = np.random.default_rng(batch * length)
    return rng.random((batch, length)) < 0.8, np.cumsum(rng.random((batch, length)) < 0.1, axis=1).astype("int32")


def exported(model, function, *examples):
    """Returns `function` of arrays `(b, t, ...)` as a graph, whose batch and length are open."""
    if keras.backend.backend() == "torch":
        import torch

        class Module(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, *tensors):
                return function(*tensors)

        open_sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
        tensors = tuple(map(torch.from_numpy, examples))
        program = torch.export.export(Module().eval(), tensors, dynamic_shapes=((open_sizes,) * len(tensors),))
        return lambda *arrays: numpy(program.module()(*map(torch.from_numpy, arrays)))
    import jax

    values = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    sizes = jax.export.symbolic_shape("b, t")
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)
    of_inputs = [jax.ShapeDtypeStruct((*sizes, *x.shape[2:]), x.dtype) for x in examples]

    @jax.jit
    def run(values, *arrays):
        pairs = zip([*model.trainable_variables, *model.non_trainable_variables], values[0] + values[1], strict=True)
        with keras.StatelessScope(state_mapping=list(pairs)):
            return function(*arrays)

    program = jax.export.export(run)(specs, *of_inputs)
    return lambda *arrays: np.asarray(program.call(values, *arrays))


@full("jax")
@pytest.mark.parametrize("kind", ["mamba", "language model"] if ON_JAX else MODELS)
def test_one_graph_computes_every_batch_and_length(kind):
    model = MODELS[kind]()
    example = inputs(kind, 2, 9)
    model(example)
    graph = exported(model, model, example)
    for sizes in SIZES:
        x = inputs(kind, *sizes)
        close(graph(x), numpy(model(x)), relative=1e-5, absolute=1e-5)


@full()
@pytest.mark.parametrize("kind", ["window"] if ON_JAX else ["mamba", "attention", "window"])
def test_one_graph_reads_padding_and_documents_of_every_length(kind):
    model = MODELS[kind]()
    example = inputs(kind, 2, 9)
    model(example)
    call = lambda x, mask, ids: model(x, mask=mask, segment_ids=ids)  # noqa: E731
    graph = exported(model, call, example, *documents(2, 9))
    for sizes in SIZES:
        given = inputs(kind, *sizes), *documents(*sizes)
        close(graph(*given), numpy(call(*map(ops.convert_to_tensor, given))), relative=1e-5, absolute=1e-5)


def test_the_exported_form_is_refused_outside_of_an_export():
    x = np.ones((1, 2, 3), "float32")
    with pytest.raises(ValueError, match="'exported': it is the form of exported graphs"):
        selective_scan(x, x, -x[0, :1].T, x[..., :1], x[..., :1], implementation="exported")

"""The C library in functions that a backend compiles, transforms or exports."""

import keras
import numpy as np
import pytest
from checks import numpy
from keras import ops

import keras_jamba
from keras_jamba.ops import causal_depthwise_conv, expert_mlp, grouped_query_attention, selective_scan

BACKEND = keras.backend.backend()
on = {name: pytest.mark.skipif(BACKEND != name, reason=f"about {name}") for name in ("jax", "tensorflow", "torch")}
A = -ops.ones((12, 4))
KERNEL = ops.ones((4, 12))


def draw(*shape):
    return ops.convert_to_tensor(np.random.default_rng(0).standard_normal(shape).astype("float32"))


def convolve_and_scan(x, implementation="native"):
    """Returns the scan of the convolved input. Slices of the input are the other tensors of the scan."""
    u = causal_depthwise_conv(x, KERNEL, activation="silu", implementation=implementation)
    return selective_scan(
        u, x * 0.3, A, x[..., :4], x[..., 4:8], z=x, delta_softplus=True, implementation=implementation
    )


def squared(x, implementation="native"):
    return ops.sum(convolve_and_scan(x, implementation) ** 2)


@on["torch"]
def test_torch_compiles_the_kernels_and_gradients_into_one_graph():
    import torch

    x, again = (draw(2, 9, 12).requires_grad_(True) for _ in range(2))
    loss = torch.compile(squared, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(loss, x)
    (expected,) = torch.autograd.grad(squared(again, "portable"), again)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)


BANKS = draw(2, 12, 6), draw(2, 6, 12)
LONG_CACHE = draw(1, 300, 2, 6)


@on["torch"]
@pytest.mark.parametrize(
    "function",
    [
        lambda x: selective_scan(x, x * 0.3, A, x[..., :4], x[..., 4:8], delta_softplus=True),
        lambda x: causal_depthwise_conv(x, KERNEL, activation="silu"),
        lambda x: expert_mlp(x[0], ops.ones((3, 1)), ops.zeros((3, 1), "int32"), *BANKS),
        lambda x: grouped_query_attention(ops.reshape(x, (1, 3, 2, 6)), LONG_CACHE, LONG_CACHE, True, offset=297),
    ],
    ids=["scan", "convolution", "experts", "attention"],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_give_the_gradient_of_autograd(function):
    import torch

    def loss(x):
        return ops.sum(function(x) ** 2)

    x = draw(1, 3, 12).requires_grad_(True)
    (expected,) = torch.autograd.grad(loss(x), x)
    np.testing.assert_allclose(torch.func.grad(loss)(x.detach()), expected, rtol=1e-4, atol=1e-4)
    rows = torch.stack([x.detach(), -x.detach()])
    np.testing.assert_allclose(torch.func.vmap(loss)(rows), [loss(row).item() for row in rows], rtol=1e-5)


@on["torch"]
def test_the_operators_pass_the_checks_of_torch():
    import torch

    x = draw(2, 9, 12).requires_grad_(True)
    tensors = (x, x, draw(12, 4), x[..., :4], x[..., 4:8], None, x, None, None, None, None)
    torch.library.opcheck(torch.ops.keras_jamba.scan_forward, (*tensors, 1, 1), test_utils="test_schema")
    torch.library.opcheck(torch.ops.keras_jamba.scan_forward, (*tensors, 1, 1), test_utils="test_faketensor")


@on["torch"]
def test_a_torch_export_does_not_call_the_library():
    import torch

    class Model(torch.nn.Module):
        def forward(self, x):
            return convolve_and_scan(x, None)

    x = draw(2, 9, 12)
    exported = torch.export.export(Model(), (x,))
    assert "keras_jamba" not in str(exported.graph)
    np.testing.assert_allclose(exported.module()(x), convolve_and_scan(x), rtol=1e-4, atol=1e-4)


@on["torch"]
def test_torch_compiles_the_kernels_once_for_all_lengths():
    import torch

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(convolve_and_scan, backend=counter, dynamic=True)
    for length in (5, 18, 40, 65):
        x = draw(2, length, 12)
        np.testing.assert_allclose(compiled(x), convolve_and_scan(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@on["jax"]
@pytest.mark.parametrize("transformation", ["jit", "vmap", "remat", "vmap of jit"])
def test_jax_transforms_the_kernels_and_their_gradients(transformation):
    import jax

    x = draw(3, 2, 9, 12)
    apply = {
        "jit": lambda f: lambda x: jax.jit(jax.grad(f))(x[0]),
        "vmap": lambda f: jax.vmap(jax.grad(f)),
        "remat": lambda f: lambda x: jax.grad(jax.checkpoint(f))(x[0]),
        "vmap of jit": lambda f: jax.vmap(jax.jit(jax.grad(f))),
    }[transformation]
    actual = apply(squared)(x)
    expected = apply(lambda x: squared(x, "portable"))(x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@on["jax"]
def test_jax_calls_the_library_except_in_exports():
    import jax

    function, x = jax.jit(convolve_and_scan), draw(2, 9, 12)
    calls = lambda text: [line for line in text.splitlines() if "custom_call" in line and "@keras_jamba" in line]  # noqa: E731
    assert len(calls(function.lower(x).as_text())) == 2
    exported = jax.export.export(function)(x)
    assert calls(exported.mlir_module()) == []
    np.testing.assert_allclose(exported.call(x), convolve_and_scan(x), rtol=1e-4, atol=1e-4)


@on["tensorflow"]
def test_tensorflow_graphs_call_the_library_and_xla_runs_the_portable_code():
    import tensorflow as tf

    x = draw(2, 9, 12)
    graph = tf.function(lambda x: convolve_and_scan(x, None))
    compiled = tf.function(lambda x: convolve_and_scan(x, None), jit_compile=True)
    assert "PyFunc" in str(graph.get_concrete_function(x).graph.as_graph_def())
    assert "PyFunc" not in str(compiled.get_concrete_function(x).graph.as_graph_def())
    expected = numpy(convolve_and_scan(x, "portable"))
    for function in (graph, compiled):
        np.testing.assert_allclose(function(x), expected, rtol=1e-4, atol=1e-4)


@on["tensorflow"]
def test_a_tensorflow_export_does_not_call_the_library(tmp_path):
    import tensorflow as tf

    class Layer(keras.layers.Layer):
        def call(self, x):
            return convolve_and_scan(x, None)

    inputs = keras.Input((9, 12))
    model, x = keras.Model(inputs, Layer()(inputs)), draw(2, 9, 12)
    model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    assert "PyFunc" not in str(loaded.signatures["serve"].graph.as_graph_def())
    np.testing.assert_allclose(loaded.serve(x), convolve_and_scan(x), rtol=1e-4, atol=1e-4)


@on["torch"]
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
def test_a_torchscript_trace_keeps_the_state_or_is_refused():
    """torch.onnx traces with TorchScript."""
    import torch

    def scan(x, implementation=None):
        return selective_scan(x, x, A, x[..., :4], x[..., 4:8], delta_softplus=True, implementation=implementation)

    x = draw(3, 9, 12)
    traced = torch.jit.trace(scan, draw(1, 9, 12), check_trace=False)
    np.testing.assert_allclose(traced(x), scan(x, "reference"), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Received: implementation='portable'.*loses the state"):
        torch.jit.trace(lambda x: scan(x, "portable"), x)
    for implementation in (None, "associative", "reference"):
        with pytest.raises(ValueError, match="fix the length with keras.Input"):
            torch.jit.trace(lambda x, name=implementation: scan(x, name), draw(1, 1, 12))


@on["torch"]
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras_jamba.layers.AttentionLayer(8, num_heads=2, use_rope=False),
        lambda: keras_jamba.layers.AttentionLayer(8, num_heads=2, use_rope=False, attention_window=3),
        lambda: keras_jamba.layers.GatedConvLayer(8),
        lambda: keras_jamba.layers.GatedConvLayer(8, bidirectional=True),
    ],
)
def test_mixers_traced_with_one_token_are_correct_for_more_or_refused(layer):
    import torch

    layer, x = layer(), draw(2, 7, 8)
    expected = numpy(layer(x))
    try:
        traced = torch.jit.trace(layer, draw(1, 1, 8), check_trace=False)
    except (ValueError, RuntimeError):
        return
    np.testing.assert_allclose(numpy(traced(x)), expected, atol=1e-5)

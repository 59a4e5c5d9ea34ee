"""Estimates equal XLA's count of operations and the bytes that PyTorch keeps."""

import functools
import json

import keras
import numpy as np
import pytest
from checks import full
from test_estimators import CELLS, FRAMES, IMAGES

import keras_jamba
from keras_jamba.estimation import model_report, scan_flops
from keras_jamba.models import JambaBackbone

BACKEND = keras.backend.backend()
ON_JAX = pytest.mark.skipif(BACKEND != "jax", reason="compares with XLA's count of operations; runs on jax")
ON_TORCH = pytest.mark.skipif(BACKEND != "torch", reason="inspects the tensors that autograd keeps; runs on torch")


def lowered_flops(function, *arguments, compiled=False):
    import jax

    program = jax.jit(function).lower(*arguments)
    return (program.compile() if compiled else program).cost_analysis()["flops"]


@ON_JAX
def test_operations_of_the_scan_equal_those_of_eight_unrolled_tokens():
    import jax
    import jax.numpy as jnp

    b, t, e, n = 8, 8, 64, 16

    def scan(tokens, A, D, bias, h):
        outputs = []
        for u, delta, B, C, z in tokens:
            delta = jax.nn.softplus(delta + bias)
            h = jnp.exp(delta[:, :, None] * A) * h + (delta * u)[:, :, None] * B[:, None]
            outputs.append((jnp.sum(h * C[:, None], axis=-1) + u * D) * jax.nn.silu(z))
        return outputs, h

    def with_gradient(cotangents, *arguments):
        outputs, gradient = jax.vjp(scan, *arguments)
        return outputs, gradient(cotangents)

    single = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")  # noqa: E731
    # One tensor per token: the gradient of a slice would have the length of the complete tensor.
    tokens = [(single(b, e), single(b, e), single(b, n), single(b, n), single(b, e))] * t
    arguments = tokens, single(e, n), single(e), single(e), single(b, e, n)
    forward, backward = scan_flops(b, t, e, n)
    assert forward == pytest.approx(lowered_flops(scan, *arguments), rel=1e-6)
    both = lowered_flops(with_gradient, ([single(b, e)] * t, single(b, e, n)), *arguments)
    assert forward + backward == pytest.approx(both, rel=0.01)


COUNTED = {
    "mamba": dict(mamba_ratio=None),
    "attention": dict(mamba_ratio=0),
    "window": dict(mamba_ratio=0, num_kv_heads=2, attention_window=32),
    "both ways": dict(mamba_ratio=1, direction="bidirectional", attention_window=32),
    "gated conv": dict(mamba_ratio=None, mixer="gated_conv"),
    "gated conv both ways": dict(mamba_ratio=None, mixer="gated_conv", direction="bidirectional"),
    "images": dict(mamba_ratio=1, num_classes=10, image_shape=(16, 16, 3), downsample=2),
    "patchify": dict(mamba_ratio=1, image_shape=(18, 16, 3), stem="patchify", downsample=4, scan_order="snake"),
    "residual": dict(mamba_ratio=1, image_shape=(16, 16, 3), downsample=2, stem="residual"),
    "seqpool": dict(mamba_ratio=1, image_shape=(16, 16, 3), downsample=2, readout="seqpool"),
    "frames": FRAMES | dict(mamba_ratio=1, downsample=2, readout="last"),
    "grid+frames": CELLS | dict(mixer="gated_conv", stem="patchify", readout="seqpool"),
}


@ON_JAX
@pytest.mark.parametrize(
    "config",
    [pytest.param(config, id=name, marks=[full()] * (i > 1)) for i, (name, config) in enumerate(COUNTED.items())],
)
def test_operations_without_the_scan_equal_xlas_count(config, monkeypatch):
    import jax

    from keras_jamba.layers import _short_convolution, mamba

    def no_scan(u, delta, A, B, C, D=None, z=None, **_):
        # The outputs have the scan's shapes and a gradient for its inputs.
        y = (u + delta) * keras.ops.silu(z) + keras.ops.sum(B * C, axis=-1, keepdims=True)
        return y, keras.ops.zeros((u.shape[0], *A.shape))

    monkeypatch.setattr(mamba, "selective_scan", no_scan)
    # XLA cannot count operations inside the C library.
    portable = functools.partial(keras_jamba.ops.causal_depthwise_conv, implementation="portable")
    monkeypatch.setattr(_short_convolution, "causal_depthwise_conv", portable)
    config = dict(d_model=128, num_layers=2, moe_frequency=0, num_heads=4) | config
    images = "image_shape" in config
    model = (keras_jamba.DHCJamba if images else JambaBackbone)(**config)
    report = model_report(model, batch_size=2, context=None if images else 128)
    trained, others = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))

    def loss(trained, inputs):
        return model.stateless_call(trained, others, inputs, training=True)[0].sum()

    inputs = jax.ShapeDtypeStruct((2, *(config["image_shape"] if images else (128, 128))), "float32")
    scans = sum("mamba" in layer.kind for layer in report.layers) * (1 + ("direction" in config))
    forward, backward = (scans * count for count in scan_flops(2, report.context, 256, 16))
    counted = lowered_flops(loss, trained, inputs, compiled=True)
    assert report.flops_forward - forward == pytest.approx(counted, rel=0.02)
    counted = lowered_flops(jax.grad(loss), trained, inputs, compiled=True)
    assert report.flops_per_step - forward - backward == pytest.approx(counted, rel=0.02)


# Patches are large, because XLA repeats the addition of the bias in each fusion.
PARTS = {"encoder": dict(stem="patchify", downsample=8), "tokens": FRAMES, "readout": CELLS | dict(readout="seqpool")}


@ON_JAX
@pytest.mark.parametrize("part", PARTS)
def test_operations_of_a_part_equal_xlas_count(part):
    import jax

    model = keras_jamba.DHCJamba(d_model=128, num_layers=1, **PARTS[part])
    row = next(layer for layer in model_report(model, batch_size=2).layers if layer.name == part)
    layer = getattr(model, part)
    trained, others = ([v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables))
    inputs, outputs = (jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for x in (layer.input, layer.output))

    def weighted(trained, inputs, weights):
        return (layer.stateless_call(trained, others, inputs)[0] * weights).sum()

    # Training computes no gradient of the pixels.
    both = jax.value_and_grad(weighted, (0,) if part == "encoder" else (0, 1))
    for function, count in ((weighted, row.flops_forward), (both, row.flops_forward + row.flops_backward)):
        counted = lowered_flops(function, trained, inputs, outputs, compiled=True) - 2 * np.prod(outputs.shape)
        assert count == pytest.approx(counted, rel=0.02)


def kept_for_the_gradient(model, inputs):
    """Returns the bytes that autograd keeps, without the model's own variables."""
    import torch

    own = {v.value.untyped_storage().data_ptr() for v in model.variables}
    sizes, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # prevents reuse of its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(inputs, training=True)
    del outputs
    return sum(sizes.values())


KEPT = {
    "jamba": dict(mamba_ratio=1, num_experts=4, num_kv_heads=2),
    "capacity": dict(mamba_ratio=None, moe_frequency=1, num_experts=4, capacity_factor=1.5, dropout=0.1),
    "plain": dict(mamba_ratio=None, moe_frequency=0, mixer_rms_norm=False, use_swiglu=False),
    "two directions": dict(mamba_ratio=None, moe_frequency=0, direction="bidirectional"),
    "gated conv": dict(mamba_ratio=None, moe_frequency=0, mixer="gated_conv"),
    "gated conv both ways": dict(mamba_ratio=1, moe_frequency=0, mixer="gated_conv", direction="bidirectional"),
    "window": dict(mamba_ratio=0, moe_frequency=0, attention_window=16),
    "wide window": dict(mamba_ratio=0, moe_frequency=0, attention_window=64),
}


@ON_TORCH
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("config", KEPT.values(), ids=KEPT)
def test_activations_equal_the_bytes_that_autograd_keeps(config, dtype):
    model = JambaBackbone(**dict(d_model=64, num_layers=2, num_heads=4, dtype=dtype) | config)
    report = model_report(model, batch_size=2, context=50)
    assert report.activations == pytest.approx(kept_for_the_gradient(model, np.ones((2, 50, 64), "float32")), rel=0.03)


@ON_TORCH
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("scan", ["portable", "associative", "reference"])
def test_activations_of_each_scan_equal_the_bytes_that_autograd_keeps(scan, dtype, monkeypatch):
    monkeypatch.setenv("KERAS_JAMBA_SCAN", scan)
    model = JambaBackbone(64, 2, mamba_ratio=None, moe_frequency=0, dtype=dtype)
    report = model_report(model, batch_size=2, context=50)
    assert report.scan == scan
    assert report.activations == pytest.approx(kept_for_the_gradient(model, np.ones((2, 50, 64), "float32")), rel=0.03)


@ON_TORCH
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", IMAGES.values(), ids=IMAGES)
def test_activations_of_image_models_equal_the_bytes_autograd_keeps(kind, dtype):
    config = dict(image_shape=(16, 16, 3), d_model=32, num_layers=2, mamba_ratio=1, dtype=dtype) | kind
    model = keras_jamba.DHCJamba(5, **config)
    report = model_report(model, batch_size=2)
    kept = kept_for_the_gradient(model, keras.ops.ones((2, *config["image_shape"])))
    assert report.activations == pytest.approx(kept, rel=0.03)


@ON_TORCH
def test_checkpointing_keeps_only_the_inputs_of_blocks():
    model = JambaBackbone(64, 4, mamba_ratio=1, num_experts=4, gradient_checkpointing=True)
    report = model_report(model, batch_size=2, context=50)
    kept = kept_for_the_gradient(model, np.ones((2, 50, 64), "float32"))
    # Autograd keeps the inputs of the blocks and the final norm. The first block's checkpoint also holds its own input.
    inside = max(layer.activations for layer in report.layers if layer.kind)
    assert report.activations - inside == pytest.approx(kept, abs=2 * 50 * 64 * 4 + 1024)


@ON_TORCH
@pytest.mark.parametrize(
    "options", [dict(stem="patchify"), dict(stem="residual"), FRAMES, FRAMES | dict(stem="patchify")]
)
def test_the_peak_equals_that_of_pytorchs_allocator(options, tmp_path):
    import torch

    config = dict(image_shape=(32, 32, 3), downsample=2, d_model=64, num_layers=2, mamba_ratio=1) | options
    model = keras_jamba.DHCJamba(5, **config, mixer="gated_conv", moe_frequency=0)
    report = model_report(model, batch_size=2)

    def step():
        model(keras.ops.ones((2, *config["image_shape"])), training=True).square().sum().backward()

    step()  # allocates the gradients, which exist during every later step
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(tmp_path / "trace"))
    events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Total Allocated"]) for event in events if event["name"] == "[memory]")
    peak = max(size for _, size in memory) - memory[-1][1]
    assert report.activations + report.working == pytest.approx(peak, rel=0.1)

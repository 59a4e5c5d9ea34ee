"""What a model costs, foretold: against built models, XLA's count, counts by hand and what PyTorch keeps."""

import functools
import json

import keras
import numpy as np
import pytest

import keras_jamba
from keras_jamba.models import JambaBackbone
from keras_jamba.training.estimators import kv_cache_bytes, model_report, scan_flops

BACKEND = keras.backend.backend()
ON_JAX = pytest.mark.skipif(BACKEND != "jax", reason="XLA's own count of operations; runs on jax")
ON_TORCH = pytest.mark.skipif(BACKEND != "torch", reason="what autograd keeps can be looked at there; runs on torch")

# Jamba-v0.1 as its checkpoint has it: 32 layers of which 4 attend, experts in every other one.
JAMBA = dict(d_model=4096, num_layers=32, mamba_ratio=7, attention_offset=4, moe_frequency=2, moe_offset=1)
JAMBA |= dict(num_experts=16, num_experts_per_token=2, d_ff=14336, num_heads=32, num_kv_heads=8, use_rope=False)
JAMBA |= dict(dt_rank=256, vocab_size=65536)
GIB = 2**30


def test_jamba_has_the_parameters_and_the_cache_of_its_paper():
    report = model_report(JAMBA, context=256 * 1024, training=False, dtype="bfloat16")
    assert report.parameters == 51_570_323_328
    assert round(report.active_parameters / 1e9, 1) == 12.1
    assert report.kv_cache == 4 * GIB
    assert report.ssm_cache == 28 * 8192 * 16 * 4
    assert report.conv_cache == 28 * 8192 * 3 * 2
    # The statistics of 16 layers with experts are all that is not in bfloat16.
    assert report.weights == 2 * report.parameters + 4 * 16 * 18


@pytest.mark.parametrize(
    "layers, kv_heads, gib", [(32, 32, 128), (32, 8, 32), (4, 8, 4)], ids=["Llama-2 7B", "Mistral and Mixtral", "Jamba"]
)
def test_caches_of_256k_tokens_are_those_of_the_papers_table(layers, kv_heads, gib):
    assert kv_cache_bytes(layers, kv_heads, 128, context=256 * 1024) == gib * GIB


CONFIGS = {
    "jamba": dict(mamba_ratio=1, num_experts=4),
    "mamba": dict(mamba_ratio=None, moe_frequency=0, mixer_rms_norm=False, proj_bias=True, conv_bias=False),
    "attention": dict(mamba_ratio=0, moe_frequency=1, num_kv_heads=2, use_swiglu=False, d_ff=40, num_experts=3),
    "two directions": dict(mamba_ratio=None, moe_frequency=0, direction="bidirectional", dt_rank=5),
    "gated conv": dict(mamba_ratio=1, num_experts=4, mixer="gated_conv"),
    "no feed-forward parts": dict(mamba_ratio=1, moe_frequency=0, d_ff=0),
    "one loss over all": dict(mamba_ratio=1, moe_frequency=1, balance_over="model"),
    "gated both ways": dict(mamba_ratio=None, mixer="gated_conv", direction="bidirectional", conv_bias=False),
}
FRAMES = dict(image_shape=(4, 16, 16, 3), tokens="frames")
CELLS = dict(image_shape=(4, 16, 16, 3), tokens="grid+frames")
IMAGES = {
    "images": {},
    "patchify": dict(stem="patchify", readout="last", direction="bidirectional"),
    "seqpool": dict(scan_order="snake", readout="seqpool"),
    "frames": FRAMES | dict(readout="seqpool"),
    "grid+frames": CELLS | dict(stem="patchify", mixer="gated_conv"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_counts_are_those_of_built_backbones(config):
    config = dict(d_model=16, num_layers=2, num_heads=4, d_state=3) | config
    assert_counted(JambaBackbone(**config), config, context=8)


@pytest.mark.parametrize("downsample", [1, 8])
@pytest.mark.parametrize("kind", IMAGES.values(), ids=IMAGES)
def test_counts_are_those_of_built_image_models(kind, downsample):
    config = dict(num_classes=3, image_shape=(16, 16, 3), downsample=downsample, d_model=16, num_layers=2, num_heads=4)
    assert_counted(keras_jamba.DHCJamba(**config | kind), config | kind)


@pytest.mark.parametrize("options, tokens", [(FRAMES, 4), (CELLS, 4 * 4 * 4)])
def test_a_clip_has_a_token_a_frame_or_a_token_a_cell(options, tokens):
    report = model_report(options)
    assert report.context == tokens
    assert report == model_report(options | dict(image_shape=(None, None, None, 3)), image_size=(4, 16, 16))


def assert_counted(model, config, **given):
    for described in (model, config):
        report = model_report(described, **given)
        assert report.parameters == sum(np.prod(v.shape, dtype=int) for v in model.trainable_variables)
        assert report.parameters + report.statistics == model.count_params()


def test_a_language_models_embeddings_count_once_where_they_are_tied():
    config = dict(d_model=16, num_layers=1, num_heads=4)
    bare, plain, tied = (
        model_report(config | words, context=8).parameters
        for words in ({}, dict(vocab_size=100), dict(vocab_size=100, tie_embeddings=True))
    )
    assert (plain - bare, tied - bare) == (2 * 100 * 16, 100 * 16)


@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_built_language_models(tied):
    model = keras_jamba.JambaCausalLM(50, tie_embeddings=tied, d_model=16, num_layers=2, num_heads=4, eos_token_id=2)
    report = model_report(model, context=8)
    assert report.parameters == sum(np.prod(v.shape, dtype=int) for v in model.trainable_variables)
    assert report.parameters + report.statistics == model.count_params()


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("window", [None, 6])
def test_caches_are_those_that_init_cache_makes(dtype, window):
    model = JambaBackbone(16, 4, mamba_ratio=1, num_heads=4, num_kv_heads=2, attention_window=window, dtype=dtype)
    cache = model.init_cache(3, max_length=10)
    assert_cached(model_report(model, batch_size=3, context=10, training=False), cache)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("options", [FRAMES, FRAMES | dict(readout="last"), CELLS | dict(readout="seqpool")])
def test_caches_of_streams_are_those_that_init_cache_makes(options, dtype):
    config = dict(d_model=16, downsample=8, num_layers=2, mamba_ratio=1, mixer="gated_conv", dtype=dtype) | options
    model = keras_jamba.DHCJamba(**config)
    cache = model.init_cache(3, max_frames=4)
    assert_cached(model_report(model, batch_size=3, training=False), cache["backbone"] | {"readout": cache["readout"]})
    for cannot_go_on in (config | dict(direction="bidirectional"), dict(num_classes=2)):
        assert model_report(cannot_go_on, training=False).cache == 0


def assert_cached(report, cache):
    for layer in report.layers:
        held = dict.fromkeys(("kv_cache", "conv_cache", "ssm_cache", "counters"), 0)
        for name, x in cache.get(layer.name, {}).items():
            kind = {"key": "kv_cache", "value": "kv_cache", "conv": "conv_cache", "ssm": "ssm_cache"}
            size = np.prod(x.shape, dtype=int) * (2 if "bfloat16" in str(x.dtype) else 4)
            held[kind.get(name, "counters")] += size
        assert {name: getattr(layer, name) for name in held} == held


def test_operations_of_experts_are_those_of_the_chosen_ones():
    config = dict(d_model=8, num_layers=1, mamba_ratio=0, num_heads=2, use_rope=False, d_ff=32)
    moe = model_report(config | dict(moe_frequency=1, num_experts=4, num_experts_per_token=2), context=10)
    dense = model_report(config | dict(moe_frequency=0), context=10)
    # 10 tokens, 2 experts each: three products of 8 x 32, and 5 operations for each of 32 hidden numbers.
    experts = 10 * 2 * (3 * 2 * 8 * 32 + 5 * 32)
    # The router's product of 8 x 4 and 8 operations an expert; the weighted sum of two outputs of 8.
    around = 10 * (2 * 8 * 4 + 8 * 4) + 10 * 2 * 2 * 8
    assert moe.flops_forward - dense.flops_forward == experts + around - 10 * (3 * 2 * 8 * 32 + 5 * 32)
    assert moe.active_parameters == dense.parameters + 8 * 4 + 3 * 8 * 32
    assert moe.parameters == moe.active_parameters + 2 * 3 * 8 * 32


def test_what_is_checkpointed_is_computed_twice_and_kept_once():
    config = dict(d_model=32, num_layers=4, num_heads=2, moe_frequency=0)
    plain = model_report(config, context=64)
    checkpointed = model_report(config, context=64, gradient_checkpointing=True)
    blocks = [layer for layer in plain.layers if layer.kind]
    assert plain.flops_recomputed == 0
    assert checkpointed.flops_recomputed == sum(layer.flops_forward for layer in blocks)
    assert checkpointed.flops_per_step == plain.flops_per_step == plain.flops_forward + plain.flops_backward
    assert checkpointed.activations == plain.activations_checkpointed < plain.activations == plain.activations_plain


@pytest.mark.parametrize(
    "dtype, weights, gradients, optimizer",
    [("float32", 4, 4, 8), ("mixed_bfloat16", 4, 4, 8), ("bfloat16", 2, 2, 4)],
)
def test_weights_gradients_and_optimizer_follow_the_dtype_policy(dtype, weights, gradients, optimizer):
    report = model_report(dict(d_model=16, num_layers=2, num_heads=4, moe_frequency=0), context=8, dtype=dtype)
    bytes_each = (report.weights, report.gradients, report.optimizer)
    assert bytes_each == tuple(report.parameters * size for size in (weights, gradients, optimizer))


def test_the_report_is_a_table_and_a_dict():
    report = model_report(JAMBA, context=4096, batch_size=2, dtype="mixed_bfloat16")
    lines = str(report).splitlines()
    assert lines[0].startswith("training, batch 2, context 4096, mixed_bfloat16")
    assert any("mamba + moe" in line and "GiB" in line for line in lines)
    assert any(line.split() == ["parameters", "51.57", "G"] for line in lines)
    read = json.loads(json.dumps(report.to_dict()))
    assert read["totals"]["parameters"] == report.parameters
    assert [layer["name"] for layer in read["layers"]] == [layer.name for layer in report.layers]


@pytest.mark.parametrize(
    "model, given, message",
    [
        (dict(d_modell=8), dict(context=8), "a constructor argument must be one of"),
        (dict(d_model=8), {}, "needs the number of tokens"),
        (dict(num_classes=2, image_shape=(None, None, 3)), {}, "takes images of any size needs one"),
        (FRAMES | dict(image_shape=(None, 8, 8, 3)), {}, r"takes images of any size.*Pass \(T, H, W\)"),
        (FRAMES, dict(image_size=(8, 8)), r"image_size must be \(T, H, W\)"),
        (dict(num_classes=2), dict(image_size=(8, 0)), "W of image_size must be an integer"),
        (dict(tokens="frames"), {}, r"image_shape must be \(T, H, W, C\)"),
        (dict(stem="resnet"), {}, "stem must be one of"),
        (dict(d_model=8, direction="both"), dict(context=8), "direction must be one of"),
        (dict(num_classes=2), dict(context=8), "An image decides"),
        (dict(d_model=8), dict(context=8, image_size=(8, 8)), "Only an image model"),
        (dict(vocab_size=8, num_classes=2), dict(context=8), "images or words"),
        (dict(tie_embeddings=True), dict(context=8), "embeddings to tie"),
        (dict(d_model=10, num_heads=4, mamba_ratio=0), dict(context=8), "num_heads must divide d_model"),
        (dict(d_model=8), dict(context=8, scan="fast"), "scan must be one of"),
        ("jamba", dict(context=8), "model must be a JambaBackbone"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(model, given, message):
    with pytest.raises(ValueError, match=message):
        model_report(model, **given)


def lowered_flops(function, *arguments, compiled=False):
    import jax

    program = jax.jit(function).lower(*arguments)
    return (program.compile() if compiled else program).cost_analysis()["flops"]


@ON_JAX
def test_operations_of_the_scan_are_those_of_eight_unrolled_tokens():
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
    # A tensor a token: the gradient of a slice would be as long as the whole.
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
    "seqpool": dict(mamba_ratio=1, image_shape=(16, 16, 3), downsample=2, readout="seqpool"),
    "frames": FRAMES | dict(mamba_ratio=1, downsample=2, readout="last"),
    "grid+frames": CELLS | dict(mixer="gated_conv", stem="patchify", readout="seqpool"),
}


@ON_JAX
@pytest.mark.parametrize("config", COUNTED.values(), ids=COUNTED)
def test_operations_without_the_scan_are_those_that_xla_counts(config, monkeypatch):
    import jax

    from keras_jamba.layers import _selective_ssm, _short_convolution

    def no_scan(u, delta, A, B, C, D=None, z=None, **_):
        # Of the same shapes, and with a gradient for all of them.
        y = (u + delta) * keras.ops.silu(z) + keras.ops.sum(B * C, axis=-1, keepdims=True)
        return y, keras.ops.zeros((u.shape[0], *A.shape))

    monkeypatch.setattr(_selective_ssm, "selective_scan", no_scan)
    in_sight = functools.partial(keras_jamba.ops.causal_depthwise_conv, implementation="portable")
    monkeypatch.setattr(_short_convolution, "causal_depthwise_conv", in_sight)  # XLA does not see into the C library
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


# Large patches: XLA adds the bias anew in each of its fusions.
PARTS = {"encoder": dict(stem="patchify", downsample=8), "tokens": FRAMES, "readout": CELLS | dict(readout="seqpool")}


@ON_JAX
@pytest.mark.parametrize("part", PARTS)
def test_operations_of_a_part_are_those_that_xla_counts(part):
    import jax

    model = keras_jamba.DHCJamba(d_model=128, num_layers=1, **PARTS[part])
    row = next(layer for layer in model_report(model, batch_size=2).layers if layer.name == part)
    layer = getattr(model, part)
    trained, others = ([v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables))
    inputs, outputs = (jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for x in (layer.input, layer.output))

    def weighted(trained, inputs, weights):
        return (layer.stateless_call(trained, others, inputs)[0] * weights).sum()

    # Nobody asks for the gradient of the pixels.
    both = jax.value_and_grad(weighted, (0,) if part == "encoder" else (0, 1))
    for function, count in ((weighted, row.flops_forward), (both, row.flops_forward + row.flops_backward)):
        counted = lowered_flops(function, trained, inputs, outputs, compiled=True) - 2 * np.prod(outputs.shape)
        assert count == pytest.approx(counted, rel=0.02)


def kept_for_the_gradient(model, inputs):
    """Bytes that autograd keeps, the model's own variables apart."""
    import torch

    own = {v.value.untyped_storage().data_ptr() for v in model.variables}
    sizes, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or its address would be given to another
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
def test_activations_are_what_autograd_keeps(config, dtype):
    model = JambaBackbone(**dict(d_model=64, num_layers=2, num_heads=4, dtype=dtype) | config)
    report = model_report(model, batch_size=2, context=50)
    assert report.activations == pytest.approx(kept_for_the_gradient(model, np.ones((2, 50, 64), "float32")), rel=0.03)


@ON_TORCH
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("scan", ["portable", "associative", "reference"])
def test_activations_are_those_of_each_scan(scan, dtype, monkeypatch):
    monkeypatch.setenv("KERAS_JAMBA_SCAN", scan)
    model = JambaBackbone(64, 2, mamba_ratio=None, moe_frequency=0, dtype=dtype)
    report = model_report(model, batch_size=2, context=50)
    assert report.scan == scan
    assert report.activations == pytest.approx(kept_for_the_gradient(model, np.ones((2, 50, 64), "float32")), rel=0.03)


@ON_TORCH
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", IMAGES.values(), ids=IMAGES)
def test_activations_of_an_image_model_are_what_autograd_keeps(kind, dtype):
    config = dict(image_shape=(16, 16, 3), d_model=32, num_layers=2, mamba_ratio=1, dtype=dtype) | kind
    model = keras_jamba.DHCJamba(5, **config)
    report = model_report(model, batch_size=2)
    kept = kept_for_the_gradient(model, keras.ops.ones((2, *config["image_shape"])))
    assert report.activations == pytest.approx(kept, rel=0.03)


@ON_TORCH
def test_with_checkpointing_autograd_keeps_the_inputs_of_blocks():
    model = JambaBackbone(64, 4, mamba_ratio=1, num_experts=4, gradient_checkpointing=True)
    report = model_report(model, batch_size=2, context=50)
    kept = kept_for_the_gradient(model, np.ones((2, 50, 64), "float32"))
    # Inputs of the blocks and the final norm; besides, the checkpoint of the first block holds its own input.
    inside = max(layer.activations for layer in report.layers if layer.kind)
    assert report.activations - inside == pytest.approx(kept, abs=2 * 50 * 64 * 4 + 1024)


@ON_TORCH
@pytest.mark.parametrize("options", [dict(stem="patchify"), FRAMES, FRAMES | dict(stem="patchify")])
def test_the_peak_is_that_of_pytorchs_allocator(options, tmp_path):
    import torch

    config = dict(image_shape=(32, 32, 3), downsample=2, d_model=64, num_layers=2, mamba_ratio=1) | options
    model = keras_jamba.DHCJamba(5, **config, mixer="gated_conv", moe_frequency=0)
    report = model_report(model, batch_size=2)

    def step():
        model(keras.ops.ones((2, *config["image_shape"])), training=True).square().sum().backward()

    step()  # the gradients of a step before are there all the time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(tmp_path / "trace"))
    events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Total Allocated"]) for event in events if event["name"] == "[memory]")
    peak = max(size for _, size in memory) - memory[-1][1]
    assert report.activations + report.working == pytest.approx(peak, rel=0.1)

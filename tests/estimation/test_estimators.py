"""Cost estimates equal built models and counts by hand."""

import json

import numpy as np
import pytest
from checks import full, numpy

import keras_jamba
from keras_jamba.estimation import kv_cache_bytes, model_report
from keras_jamba.models import JambaBackbone

# Jamba-v0.1 as in its checkpoint: 32 layers, 4 of them with attention, experts in every second layer.
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
    # Only the statistics of the 16 layers with experts are not in bfloat16.
    assert report.weights == 2 * report.parameters + 4 * 16 * 18


@pytest.mark.parametrize(
    "layers, kv_heads, gib", [(32, 32, 128), (32, 8, 32), (4, 8, 4)], ids=["Llama-2 7B", "Mistral and Mixtral", "Jamba"]
)
def test_caches_of_256k_tokens_equal_the_papers_table(layers, kv_heads, gib):
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
    "residual": dict(stem="residual", stem_blocks=2),
    "seqpool": dict(scan_order="snake", readout="seqpool"),
    "frames": FRAMES | dict(readout="seqpool"),
    "grid+frames": CELLS | dict(stem="patchify", mixer="gated_conv"),
}


@full("jax")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_counts_equal_those_of_built_backbones(config):
    config = dict(d_model=16, num_layers=2, num_heads=4, d_state=3) | config
    assert_counted(JambaBackbone(**config), config, context=8)


@full("jax")
@pytest.mark.parametrize("downsample", [1, 8])
@pytest.mark.parametrize("kind", IMAGES.values(), ids=IMAGES)
def test_counts_equal_those_of_built_image_models(kind, downsample):
    config = dict(num_classes=3, image_shape=(16, 16, 3), downsample=downsample, d_model=16, num_layers=2, num_heads=4)
    assert_counted(keras_jamba.DHCJamba(**config | kind), config | kind)


@pytest.mark.parametrize("options, tokens", [(FRAMES, 4), (CELLS, 4 * 4 * 4)])
def test_a_clip_has_one_token_per_frame_or_per_cell(options, tokens):
    report = model_report(options)
    assert report.context == tokens
    assert report == model_report(options | dict(image_shape=(None, None, None, 3)), image_size=(4, 16, 16))


def assert_counted(model, config, **given):
    for described in (model, config):
        report = model_report(described, **given)
        assert report.parameters == sum(np.prod(v.shape, dtype=int) for v in model.trainable_variables)
        assert report.parameters + report.statistics == model.count_params()


def test_tied_embeddings_of_a_language_model_count_once():
    config = dict(d_model=16, num_layers=1, num_heads=4)
    bare, plain, tied = (
        model_report(config | words, context=8).parameters
        for words in ({}, dict(vocab_size=100), dict(vocab_size=100, tie_embeddings=True))
    )
    assert (plain - bare, tied - bare) == (2 * 100 * 16, 100 * 16)


def test_a_large_vocabulary_keeps_the_logits_of_one_chunk():
    config = dict(d_model=16, num_layers=1, num_heads=4, vocab_size=32768)
    few, many, more = (model_report(config, context=t).layers[-1].activations for t in (512, 4096, 8192))
    # Up to 64 MiB of logits and as much of their gradient exist at once.
    assert few == 512 * (16 * 4 + 2 * 4 * 32768)
    assert many == 4096 * (16 * 4 + 3 * 4) + 2 * 2**26
    assert more - many == 4096 * (16 * 4 + 3 * 4)


@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_those_of_built_language_models(tied):
    model = keras_jamba.JambaCausalLM(50, tie_embeddings=tied, d_model=16, num_layers=2, num_heads=4, eos_token_id=2)
    report = model_report(model, context=8)
    assert report.parameters == sum(np.prod(v.shape, dtype=int) for v in model.trainable_variables)
    assert report.parameters + report.statistics == model.count_params()
    arguments = {name: x for name, x in model.get_config().items() if name != "name"}
    assert model_report(arguments, context=8) == report


@full("jax", "tensorflow")
@pytest.mark.parametrize("quantization", ["int8", "int4", "experts_int8"])
def test_quantized_weights_equal_those_of_built_models(quantization):
    given = dict(d_model=16, num_layers=2, mamba_ratio=1, d_ff=70, num_heads=4, quantization=quantization)
    for model in (
        keras_jamba.JambaCausalLM(50, **given),
        keras_jamba.JambaCausalLM(50, tie_embeddings=True, use_swiglu=False, **given),
        keras_jamba.JambaBackbone(direction="bidirectional", mixer="gated_conv", **given),
    ):
        stored = sum(numpy(v.value).nbytes for v in model.weights)
        assert model_report(model, context=8, training=False).weights == stored


@full("jax")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("window", [None, 6])
def test_caches_equal_those_of_init_cache(dtype, window):
    model = JambaBackbone(16, 4, mamba_ratio=1, num_heads=4, num_kv_heads=2, attention_window=window, dtype=dtype)
    cache = model.init_cache(3, max_length=10)
    assert_cached(model_report(model, batch_size=3, context=10, training=False), cache)


@full("jax")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("options", [FRAMES, FRAMES | dict(readout="last"), CELLS | dict(readout="seqpool")])
def test_caches_of_streams_equal_those_of_init_cache(options, dtype):
    config = dict(d_model=16, downsample=8, num_layers=2, mamba_ratio=1, mixer="gated_conv", dtype=dtype) | options
    model = keras_jamba.DHCJamba(**config)
    cache = model.init_cache(3, max_frames=4)
    assert_cached(model_report(model, batch_size=3, training=False), cache["backbone"] | {"readout": cache["readout"]})
    for not_streaming in (config | dict(direction="bidirectional"), dict(num_classes=2)):
        assert model_report(not_streaming, training=False).cache == 0


def assert_cached(report, cache):
    for layer in report.layers:
        held = dict.fromkeys(("kv_cache", "conv_cache", "ssm_cache", "counters"), 0)
        for name, x in cache.get(layer.name, {}).items():
            kind = {"key": "kv_cache", "value": "kv_cache", "conv": "conv_cache", "ssm": "ssm_cache"}
            size = np.prod(x.shape, dtype=int) * (2 if "bfloat16" in str(x.dtype) else 4)
            held[kind.get(name, "counters")] += size
        assert {name: getattr(layer, name) for name in held} == held


def test_operations_of_experts_count_only_the_chosen_experts():
    config = dict(d_model=8, num_layers=1, mamba_ratio=0, num_heads=2, use_rope=False, d_ff=32)
    moe = model_report(config | dict(moe_frequency=1, num_experts=4, num_experts_per_token=2), context=10)
    dense = model_report(config | dict(moe_frequency=0), context=10)
    # 10 tokens, 2 experts per token: three products of 8 x 32, and 5 operations per each of 32 hidden values.
    experts = 10 * 2 * (3 * 2 * 8 * 32 + 5 * 32)
    # The router's product of 8 x 4, 8 operations per expert, and the weighted sum of two outputs of 8.
    routing = 10 * (2 * 8 * 4 + 8 * 4) + 10 * 2 * 2 * 8
    assert moe.flops_forward - dense.flops_forward == experts + routing - 10 * (3 * 2 * 8 * 32 + 5 * 32)
    assert moe.active_parameters == dense.parameters + 8 * 4 + 3 * 8 * 32
    assert moe.parameters == moe.active_parameters + 2 * 3 * 8 * 32


def test_checkpointed_blocks_are_computed_twice():
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
        (dict(num_classes=2, image_shape=(None, None, 3)), {}, "takes images of any size needs image_size"),
        (FRAMES | dict(image_shape=(None, 8, 8, 3)), {}, r"takes images of any size.*Pass \(T, H, W\)"),
        (FRAMES, dict(image_size=(8, 8)), r"image_size must be \(T, H, W\)"),
        (dict(num_classes=2), dict(image_size=(8, 0)), "W of image_size must be an integer"),
        (dict(tokens="frames"), {}, r"image_shape must be \(T, H, W, C\)"),
        (dict(stem="resnet"), {}, "stem must be one of"),
        (dict(d_model=8, direction="both"), dict(context=8), "direction must be one of"),
        (dict(num_classes=2), dict(context=8), "image model takes no context"),
        (dict(d_model=8), dict(context=8, image_size=(8, 8)), "Only an image model"),
        (dict(vocab_size=8, num_classes=2), dict(context=8), "images or words"),
        (dict(tie_embeddings=True), dict(context=8), "embeddings to tie"),
        (dict(d_model=10, num_heads=4, mamba_ratio=0), dict(context=8), "num_heads must divide d_model"),
        (dict(d_model=8), dict(context=8, scan="fast"), "scan must be one of"),
        ("jamba", dict(context=8), "model must be a JambaBackbone"),
    ],
)
def test_invalid_arguments_are_refused_with_a_remedy(model, given, message):
    with pytest.raises(ValueError, match=message):
        model_report(model, **given)

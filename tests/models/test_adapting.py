"""Quantized and adapted models: golden numbers, exact reloading, trained weights, and files."""

import gc
import json
import warnings
import weakref

import keras
import numpy as np
import pytest
from checks import full, jitted, numpy, once
from golden_jamba import FOLDER, recorded
from keras import ops

import keras_jamba
from keras_jamba.layers import FeedForward, MambaLayer, MoELayer, quantize

TINY = dict(vocab_size=31, d_model=16, num_layers=2, mamba_ratio=1, num_experts=4, d_ff=12, num_heads=2, d_state=4)
IDS = np.random.default_rng(0).integers(0, 31, (2, 8)).astype("int32")
IMAGES = np.random.default_rng(0).random((4, 8, 8, 1)).astype("float32")


def tiny(**given):
    keras.utils.set_random_seed(0)
    return keras_jamba.JambaCausalLM(**TINY | given)


def pictures(**given):
    keras.utils.set_random_seed(0)
    sizes = {k: v for k, v in TINY.items() if k != "vocab_size"}
    return keras_jamba.DHCJamba(num_classes=3, image_shape=(8, 8, 1), **sizes | given)


MODELS = {"text": (tiny, IDS), "images": (pictures, IMAGES)}


def logits(model, inputs):
    """Returns logits from one program, which discards the updates of router statistics."""

    def run(x):
        values = [
            [v.value for v in variables] for variables in (model.trainable_variables, model.non_trainable_variables)
        ]
        return model.stateless_call(*values, x)[0]

    return numpy(jitted(run)(ops.convert_to_tensor(inputs)))


def values(model):
    return {v.path: numpy(v.value) for v in model.weights}


def trained(model):
    """Returns `model` after some training steps, which change every adapter."""
    on_images = isinstance(model, keras_jamba.DHCJamba)
    x, y = (IMAGES, np.array([0, 1, 2, 0])) if on_images else (IDS, np.roll(IDS, -1, 1))
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=3, verbose=0)
    return model


# Quantization


@full("jax", "tensorflow")
@pytest.mark.parametrize("case", ["dense", "gqa_leftpad", "proj_bias", "mamba1_lm"])
def test_int8_logits_are_within_two_percent_of_golden_logits(case):
    model = keras_jamba.JambaCausalLM.from_preset(FOLDER / case, quantization="int8")
    error = logits(model, recorded(case)["input_ids"]) - recorded(case)["logits"]
    assert 1e-4 < np.linalg.norm(error) / np.linalg.norm(recorded(case)["logits"]) < 0.02


@full("jax")
def test_int8_logits_of_sixteen_experts_are_within_two_percent():
    model = keras_jamba.JambaCausalLM.from_preset(FOLDER / "moe", quantization="experts_int8")
    error = logits(model, recorded("moe")["input_ids"]) - recorded("moe")["logits"]
    assert 1e-4 < np.linalg.norm(error) / np.linalg.norm(recorded("moe")["logits"]) < 0.02


@full("jax")
def test_int8_greedy_tokens_equal_those_of_floating_point():
    arrays = recorded("dense")
    model = keras_jamba.JambaCausalLM.from_preset(FOLDER / "dense", quantization="int8")
    inputs = {"token_ids": arrays["gen_input_ids"], "padding_mask": arrays["gen_attention_mask"]}
    tokens = model.generate(inputs, max_new_tokens=12, stop_token_ids=None)
    mask = np.pad(inputs["padding_mask"].astype(bool), ((0, 0), (0, 12)), constant_values=True)
    np.testing.assert_array_equal(tokens[mask], arrays["gen_tokens"][mask])


@full("jax", "tensorflow")
@pytest.mark.parametrize(("kind", "mode"), [("text", "int8"), ("text", "int4"), ("images", "experts_int8")])
def test_quantizing_saving_and_loading_give_the_same_model(kind, mode, tmp_path):
    make, inputs = MODELS[kind]
    model = make()
    exact = logits(model, inputs)
    model.save_to_preset(tmp_path / "float")
    model.quantize(mode)
    expected = logits(model, inputs)
    assert 0 < np.linalg.norm(expected - exact) < np.linalg.norm(exact)
    model.save_to_preset(tmp_path / "quantized")
    model.save(tmp_path / "quantized.keras")
    for same in (
        type(model).from_preset(tmp_path / "float", quantization=mode),
        type(model).from_preset(tmp_path / "quantized"),
        keras.models.load_model(tmp_path / "quantized.keras", compile=False),
    ):
        assert same.get_config()["quantization"] == mode
        for path, value in values(model).items():
            np.testing.assert_array_equal(values(same)[path], value)
    np.testing.assert_array_equal(logits(same, inputs), expected)
    assert json.loads((tmp_path / "quantized" / "config.json").read_text())["config"]["quantization"] == mode


def bytes_by_hand(model, mode):
    """Returns the bytes of all weights, computed from their shapes in floating point."""
    total = 0
    for path, shape in model.float_shapes().items():
        size, name = int(np.prod(shape)), path.rsplit("/", 1)[-1]
        bank = name.endswith("_bank")
        projection = name == "reverse_embeddings" or (name == "kernel" and "_proj/" in path and "dt_proj" not in path)
        if not (bank or (projection and mode != "experts_int8")):
            total += 4 * size
        elif mode == "int4" and name != "reverse_embeddings":
            groups = size // shape[-2] * -(-shape[-2] // 64)
            total += size // shape[-1] * -(-shape[-1] // 2) + 5 * groups
        else:
            total += size + 4 * size // shape[-2]
    return total


@full("jax")
@pytest.mark.parametrize("mode", ["int8", "int4", "experts_int8"])
def test_stored_sizes_match_the_formula(mode):
    model = tiny(quantization=mode)
    stored = sum(numpy(v.value).nbytes for v in model.weights)
    assert stored == bytes_by_hand(model, mode) < sum(4 * np.prod(shape) for shape in model.float_shapes().values())


def test_parameters_of_exponentials_stay_in_floating_point():
    quantized = {v.path for v in tiny(quantization="int4").weights if v.dtype == "int8"}
    assert quantized and not [
        p for p in quantized for part in ("router", "A_log", "/D", "dt_", "conv", "norm") if part in p
    ]


@full("jax")
def test_quantized_layers_of_a_custom_model_reload_exactly(tmp_path):
    inputs = keras.Input((None, 8))
    mamba, experts = MambaLayer(8, dt_rank=2, d_state=4), MoELayer(8, 4, d_ff=6)
    model = keras.Model(inputs, keras.layers.Dense(3)(experts(mamba(inputs))))
    quantize(experts, "int8")
    quantize(mamba, "int4")
    model.layers[-1].quantize("int8")  # Keras' own
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
    np.testing.assert_array_equal(logits(keras.models.load_model(tmp_path / "model.keras"), x), logits(model, x))


@full("jax")
def test_quantize_of_keras_reaches_the_projections_of_our_layers():
    model = keras.Sequential([keras.Input((None, 8)), MambaLayer(8, dt_rank=2, d_state=4, name="mamba")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns that it cannot quantize an InputLayer
        model.quantize("int8")
    assert sorted(v.path.split("mamba/")[1] for v in model.weights if v.dtype == "int8") == [
        "in_proj/kernel",
        "out_proj/kernel",
        "ssm/x_proj/kernel",
    ]


@once
def test_a_quantized_layer_keeps_its_values_under_another_policy():
    layer = FeedForward(8)
    x = np.random.default_rng(0).standard_normal((1, 3, 8)).astype("float32")
    layer(x)
    quantize(layer, "int8")
    expected = numpy(layer(x))
    for projection in (layer.gate_proj, layer.up_proj, layer.down_proj):
        projection.dtype_policy = "float32"
    np.testing.assert_allclose(numpy(layer(x)), expected, atol=1e-6)


@once
def test_quantizing_after_a_freeze_leaves_the_layer_collectable():
    gc.freeze()
    layer = FeedForward(8)
    layer.build((None, None, 8))
    quantize(layer, "int8")
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None


def test_invalid_quantization_is_refused():
    model = tiny(quantization="int8")
    with pytest.raises(ValueError, match="is quantized already"):
        model.quantize("int8")
    with pytest.raises(ValueError, match="Use bfloat16"):
        tiny(quantization="int8", dtype="mixed_float16")
    with pytest.raises(ValueError, match="mode must be one of"):
        model.quantize("int2")
    with pytest.raises(ValueError, match="quantization must be one of"):
        tiny(quantization="fp4")
    with pytest.raises(ValueError, match="without any"):
        tiny(moe_frequency=0, quantization="experts_int8")


def test_a_quantized_model_exports_dequantized_weights(tmp_path):
    model = keras_jamba.JambaCausalLM.from_preset(FOLDER / "dense", quantization="int8")
    expected = logits(model, recorded("dense")["input_ids"])
    model.export_to_transformers(tmp_path / "hf")
    again = keras_jamba.JambaCausalLM.from_preset(tmp_path / "hf")
    np.testing.assert_allclose(logits(again, recorded("dense")["input_ids"]), expected, atol=1e-4)


# Adapters


@full("jax", "tensorflow")
@pytest.mark.parametrize("kind", MODELS)
def test_training_changes_only_adapters(kind):
    model = MODELS[kind][0]()
    model.enable_lora(2, also_train="head" if kind == "images" else ())
    before = values(model)
    after = values(trained(model))
    changed = {path for path in after if not np.array_equal(after[path], before[path])}
    statistics = {path for path in after if path.rsplit("/", 1)[-1] in ("usage", "drop_rate", "aux_loss")}
    expected = {path for path in after if "_lora_" in path}
    expected |= {"head/kernel", "head/bias"} if kind == "images" else set()
    assert changed - statistics == expected == {v.path for v in model.trainable_weights}


@full("jax", "tensorflow")
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_adapters_are_saved_separately_loaded_and_merged(quantization, tmp_path):
    model = tiny()
    if quantization:
        model.quantize(quantization)
    model.save_to_preset(tmp_path / "base")
    model.enable_lora(2, ["attention", "mamba.in_proj", "experts"], lora_alpha=8, also_train="final_norm")
    expected = logits(trained(model), IDS)
    model.save_lora(tmp_path / "adapters.safetensors")
    again = keras_jamba.JambaCausalLM.from_preset(tmp_path / "base")
    assert np.abs(logits(again, IDS) - expected).max() > 1e-3
    again.load_lora(tmp_path / "adapters.safetensors")
    np.testing.assert_array_equal(logits(again, IDS), expected)
    assert {v.path for v in again.trainable_weights} == {v.path for v in model.trainable_weights}
    again.merge_lora()
    if quantization is None:
        np.testing.assert_allclose(logits(again, IDS), expected, atol=1e-5)
        again.save_to_preset(tmp_path / "merged")
        merged = keras_jamba.JambaCausalLM.from_preset(tmp_path / "merged")
        np.testing.assert_array_equal(logits(merged, IDS), logits(again, IDS))


@full("jax")
def test_generation_follows_adapters():
    model = tiny()
    given = dict(max_new_tokens=12, stop_token_ids=None, strip_prompt=True)
    before = model.generate(IDS, **given)
    model.enable_lora(2)
    np.testing.assert_array_equal(model.generate(IDS, **given), before)
    for variable in model.trainable_weights:
        variable.assign(np.random.default_rng(0).standard_normal(variable.shape))
    adapted = model.generate(IDS, **given)
    assert (adapted != before).any()
    expected = logits(model, IDS)[:, -1].argmax(-1)
    np.testing.assert_array_equal(adapted[:, 0], expected)


def test_incompatible_adapter_files_change_nothing(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="There must be adapters"):
        model.save_lora(tmp_path / "none.safetensors")
    model.enable_lora(2, "mamba")
    model.save_lora(tmp_path / "a.safetensors")
    other = tiny(d_model=8)
    with pytest.raises(ValueError, match="Adapters must fit the layers"):
        other.load_lora(tmp_path / "a.safetensors")
    assert not [v for v in other.weights if "_lora_" in v.path]
    attention = tiny()
    attention.enable_lora(2, "attention")
    with pytest.raises(ValueError, match="must have the layers, rank and lora_alpha"):
        attention.load_lora(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:100])
    for damaged in ("b.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match="must be a file that save_lora wrote"):
            tiny().load_lora(tmp_path / damaged)
    model.trainable_weights[0].assign(np.full(model.trainable_weights[0].shape, np.nan))
    with pytest.raises(ValueError, match="Adapters must be finite"):
        model.save_lora(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="Only models that transformers has"):
        pictures().load_lora(tmp_path)


WAYS_TO_SAVE = {
    "preset": lambda model, file: model.save_to_preset(file),
    "keras": lambda model, file: model.save(file),
    "keras.saving": lambda model, file: keras.saving.save_model(model, file),
    "inside another": lambda model, file: keras.Sequential([keras.Input((4, 16)), model.backbone]).save(file),
    "transformers": lambda model, file: model.export_to_transformers(file),
}


@full("jax", "tensorflow")
@pytest.mark.parametrize("way", [way for way in WAYS_TO_SAVE if way != "transformers"])
def test_a_partly_quantized_model_is_not_saved(way, tmp_path):
    partial = tiny(moe_frequency=0, dt_rank=1)
    quantize(partial.backbone.blocks[0], "int8")
    with pytest.raises(ValueError, match="Call quantize of the model"):
        WAYS_TO_SAVE[way](partial, tmp_path / "model.keras")
    # Keras opens these files before the check.
    assert not list(tmp_path.iterdir()) or way in ("keras.saving", "inside another")


@pytest.mark.parametrize("way", ["preset", "transformers"])
def test_presets_and_transformers_checkpoints_refuse_adapters(way, tmp_path):
    adapted = tiny(moe_frequency=0, dt_rank=1)
    adapted.enable_lora(2)
    with pytest.raises(ValueError, match="Call merge_lora first"):
        WAYS_TO_SAVE[way](adapted, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_a_quantized_preset_refuses_another_quantization(tmp_path):
    tiny(quantization="int8").save_to_preset(tmp_path / "quantized")
    for other in (None, "int4"):
        with pytest.raises(ValueError, match="A quantized preset must be loaded with its own quantization"):
            keras_jamba.JambaCausalLM.from_preset(tmp_path / "quantized", quantization=other)


def test_a_quantized_dtype_policy_of_a_layer_is_refused():
    with pytest.raises(ValueError, match="has a dtype policy in floating point"):
        MambaLayer(8, dtype="int8_from_float32")


def test_also_train_trains_named_layers_and_refuses_quantized_ones():
    model = tiny()
    model.enable_lora(2, "mamba", also_train="mixer_norm")
    fully_trained = [v.path for v in model.trainable_weights if "_lora_" not in v.path]
    assert fully_trained == ["backbone/block_0/mixer_norm/scale", "backbone/block_1/mixer_norm/scale"]
    quantized = tiny(quantization="int8")
    with pytest.raises(ValueError, match="layers of also_train must be in floating point"):
        quantized.enable_lora(2, "mamba", also_train="q_proj")
    assert not [v for v in quantized.weights if "_lora_" in v.path]


@full("jax", "tensorflow")
def test_adapters_train_after_fit_without_another_compile():
    model = trained(tiny())
    model.enable_lora(2)
    before = values(model)
    # In the first step matrix A has no gradient, because matrix B is zero.
    model.fit(IDS, np.roll(IDS, -1, 1), epochs=2, verbose=0)
    assert all((numpy(v.value) != before[v.path]).any() for v in model.trainable_weights)


@full("tensorflow")
def test_save_weights_restores_weights_and_adapters_exactly(tmp_path):
    model = tiny()
    model.enable_lora(2)
    expected = values(trained(model))
    model.save_weights(tmp_path / "all.weights.h5")
    again = tiny()
    again.enable_lora(2)
    again.load_weights(tmp_path / "all.weights.h5")
    for path, value in values(again).items():
        np.testing.assert_array_equal(value, expected[path])
    with pytest.raises(ValueError, match="enable_lora as it was"):
        tiny().load_weights(tmp_path / "all.weights.h5")

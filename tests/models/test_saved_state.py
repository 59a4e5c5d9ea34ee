"""Saving, pickling, copying and cloning keep all state that `fit` and `generate` use."""

import copy
import pickle

import keras
import numpy as np
import pytest
from checks import full, once
from keras import ops
from saved_state import (
    BACKEND,
    MODELS,
    WITH_WEIGHTS,
    check_comes_back,
    check_same,
    compilation,
    frozen,
    image_classifier,
    language_model,
    state,
    ways_of,
)

import keras_jamba
from keras_jamba import layers
from keras_jamba.tokenizers import ByteTokenizer

# Changes to a model before it is saved


def freeze_a_layer(model):
    getattr(model, "backbone", model).blocks[0].mixer.trainable = False


def freeze_the_stem(model):
    model.encoder.trainable = model.tokens.trainable = model.readout.trainable = False


def freeze_all_but_one_layer(model):
    model.trainable = False
    getattr(model, "backbone", model).final_norm.trainable = True


def freeze_a_variable(model):
    for variable in getattr(model, "backbone", model).weights[:3]:
        variable.trainable = False


def adapt(model):
    model.enable_lora(2, ["attention", "mamba.in_proj", "experts"], lora_alpha=8, also_train="mixer_norm")


def adapt_one_layer(model):
    getattr(model, "backbone", model).blocks[0].mixer.in_proj.enable_lora(3)


def quantize(mode):
    return lambda model: model.quantize(mode)


def adapt_in(mode):
    def change(model):
        model.quantize(mode)
        adapt(model)

    return change


def give_files(model):
    model.tokenizer = ByteTokenizer(add_bos=False)
    model.generation_config = {"do_sample": True, "top_k": 3}
    model.sampler = keras_jamba.Sampler(top_p=0.5, seed=3)


TEXT, BACKBONE, TEXTS, PICTURES = MODELS
# `{name: (change, kinds of models)}`
CHANGES = {
    "nothing": (lambda model: None, MODELS),
    "a frozen layer": (freeze_a_layer, [TEXT, PICTURES]),
    "a frozen stem": (freeze_the_stem, [PICTURES]),
    "all frozen but one layer": (freeze_all_but_one_layer, [BACKBONE, TEXTS]),
    "frozen variables": (freeze_a_variable, [TEXT, PICTURES]),
    "adapters": (adapt, [TEXTS, PICTURES]),
    "one adapter": (adapt_one_layer, [BACKBONE]),
    "int8": (quantize("int8"), [PICTURES]),
    "experts_int8": (quantize("experts_int8"), [TEXT]),
    "int4 and adapters": (adapt_in("int4"), [BACKBONE, TEXT]),
    "files": (give_files, [TEXT, TEXTS]),
}
POLICIES = keras.dtype_policies.DTypePolicyMap("float32", {".*/in_proj": keras.DTypePolicy("mixed_bfloat16")})
OPTIONS = {
    "mixed_bfloat16": (dict(dtype="mixed_bfloat16"), [PICTURES, TEXTS]),
    "bfloat16": (dict(dtype="bfloat16"), [BACKBONE]),
    "several policies": (dict(dtype=POLICIES), MODELS),
    "dropout": (dict(dropout=0.1, drop_path=0.2, gradient_checkpointing=True), [PICTURES, TEXT]),
    "a router": (dict(router=layers.Router(3, 2, name="own"), capacity_factor=1.5, attention_window=4), [BACKBONE]),
    "two directions": (dict(direction="bidirectional", mixer="gated_conv"), [PICTURES, TEXTS]),
}


def pairs(table):
    return [(name, kind) for name, (_, kinds) in table.items() for kind in kinds]


@once
@pytest.mark.parametrize(("change", "kind"), pairs(CHANGES))
def test_an_uncompiled_model_is_restored(change, kind, tmp_path):
    model = MODELS[kind][0]()
    CHANGES[change][0](model)
    check_comes_back(model, tmp_path)


@once
@pytest.mark.parametrize(("options", "kind"), pairs(OPTIONS))
def test_policies_and_options_are_restored(options, kind, tmp_path):
    check_comes_back(MODELS[kind][0](**OPTIONS[options][0]), tmp_path)


@once
def test_a_keras_clone_of_a_functional_model_has_the_same_frozen_weights():
    model = image_classifier()
    freeze_the_stem(model)
    freeze_a_variable(model)
    clone = keras.models.clone_model(model)
    assert frozen(clone)[1:] == frozen(model)[1:] and len(clone.trainable_variables) == len(model.trainable_variables)


# Compiled models


def compiled(kind, **given):
    """Returns a compiled model of a kind, with a built optimizer."""
    make, _, _, loss = MODELS[kind]
    options = {name: given.pop(name) for name in ("dtype",) if name in given}
    model = make(**options)
    model.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": loss} | given)
    model.optimizer.build(model.trainable_variables)
    return model


@full("jax", "tensorflow")
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("classifier of images", dict(jit_compile=True, metrics=["accuracy"])),
        ("classifier of texts", dict(jit_compile=False, steps_per_execution=3)),
        ("backbone", dict(run_eagerly=True, loss_weights=[0.5], weighted_metrics=["mae"])),
        ("backbone", dict(dtype="mixed_float16")),
        ("classifier of images", dict(dtype="mixed_float16", auto_scale_loss=False)),
        ("language model", dict(sampler=keras_jamba.generation.BeamSampler(3), loss=None, weighted_metrics=None)),
    ],
)
def test_a_compiled_model_is_restored_with_its_compilation(kind, given, tmp_path):
    model = compiled(kind, **given)
    expected = compilation(model)
    for name, way in ways_of(model).items():
        if name != "config":
            found = compilation(way(model, tmp_path))
            assert {part: (x, expected[part]) for part, x in found.items() if x != expected[part]} == {}, name


@full("jax", "tensorflow")
@pytest.mark.parametrize(
    ("jit_compile", "compiled_on", "expected"),
    [("auto", None, "auto"), (True, BACKEND, True), (False, BACKEND, False)]
    # Compiled on another backend, or by a version that stored the value of "auto" without its backend.
    + [(True, "another", "auto"), (False, "another", "auto"), (True, None, "auto"), (False, None, "auto")],
)
def test_jit_compile_is_restored_only_on_its_own_backend(jit_compile, compiled_on, expected):
    usual = compiled("backbone", jit_compile="auto").jit_compile
    stored = keras.saving.serialize_keras_object(compiled("backbone", jit_compile=jit_compile))
    assert stored["config"].pop("compiled_on", None) == (None if jit_compile == "auto" else BACKEND)
    stored["config"] |= {} if compiled_on is None else {"compiled_on": compiled_on}
    again = keras.saving.deserialize_keras_object(stored)
    assert again.jit_compile == (usual if expected == "auto" else expected)
    assert again.get_compile_config()["jit_compile"] == expected


@once
def test_a_model_that_is_loaded_without_compiling_keeps_its_sampler(tmp_path):
    model = compiled("language model", sampler=keras_jamba.Sampler(top_k=3, seed=1))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert not again.compiled and again.sampler.get_config() == model.sampler.get_config()


@once
def test_a_tokenizer_inside_a_custom_model_is_restored(tmp_path):
    inner, inputs = language_model(), keras.Input((None,), dtype="int32")
    inner.tokenizer = ByteTokenizer(add_bos=False)
    model = keras.Model(inputs, inner(inputs))
    for way in WITH_WEIGHTS.values():
        assert vars(way(model, tmp_path).layers[-1].tokenizer) == {"add_bos": False}


# Behaviour: `{kind: (options, change, compile, way)}`. Each kind has one way, because every step must be compiled.

# On PyTorch, Keras' dropout draws from the process's generator, and drop_path draws from the block's generator.
DROPS = dict(dropout=0.0 if BACKEND == "torch" else 0.2, drop_path=0.2)
STEPS = {
    "language model": ({}, adapt_in("int8"), dict(sampler=keras_jamba.Sampler(top_k=3, seed=1)), "checkpoint"),
    "classifier of images": (DROPS, freeze_the_stem, dict(metrics=["accuracy"]), "pickle"),
    "backbone": (dict(dtype="mixed_bfloat16"), freeze_a_layer, dict(weighted_metrics=["mae"]), "deepcopy"),
    "classifier of texts": (dict(gradient_checkpointing=True), freeze_a_variable, {}, "keras"),
}


@full("jax", "tensorflow")
@pytest.mark.parametrize("kind", STEPS)
def test_a_restored_model_takes_the_same_next_training_step(kind, tmp_path):
    make, x, y, loss = MODELS[kind]
    options, change, given, way = STEPS[kind]
    model = make(**options)
    change(model)
    if kind == "language model":
        model.tokenizer = ByteTokenizer()
    model.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": loss} | given)
    file = tmp_path / "model.keras"
    checkpoint = [keras.callbacks.ModelCheckpoint(file, save_freq=1)] if way == "checkpoint" else []
    model.fit(x, y, verbose=0, shuffle=False, callbacks=checkpoint)
    again = keras.models.load_model(file) if way == "checkpoint" else WITH_WEIGHTS[way](model, tmp_path)
    before = state(model)
    check_same(state(again), before)
    logs, expected = (each.fit(x, y, verbose=0, shuffle=False).history for each in (again, model))
    assert logs == expected
    check_same(state(again), state(model))
    moved = {path for path, value in state(again).items() if not np.array_equal(value, before[path])}
    trained = {v.path for v in model.trainable_variables}
    statistics = {v.path for v in model.weights if v.name in ("usage", "drop_rate", "aux_loss")}
    assert trained == {path for path in moved - statistics if isinstance(path, str)} and len(trained) > 1
    if kind == "language model":
        assert again.generate("ab", max_new_tokens=4) == model.generate("ab", max_new_tokens=4)
        again.merge_lora()


# Objects that cannot be saved


class Letters:
    """A tokenizer without a method `save`."""

    eos_token_id = None

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class SavedLetters(Letters):
    """A tokenizer whose file `load_tokenizer` cannot read."""

    def save(self, folder):
        (folder / "letters.txt").write_text("abc")


class Draws:
    """A sampler without a method `get_config`."""

    def get_next_token(self, probabilities):
        return ops.argmax(probabilities, axis=-1)


@once
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("tokenizer", Letters(), "must have a method save"),
        ("tokenizer", SavedLetters(), "load_tokenizer returns"),
        ("sampler", Draws(), "saved by its get_config"),
    ],
)
def test_unsavable_objects_are_refused_before_anything_is_written(attribute, value, message, tmp_path):
    model = language_model()
    setattr(model, attribute, value)
    ways = [lambda: model.save(tmp_path / "model.keras"), lambda: pickle.dumps(model), lambda: copy.deepcopy(model)]
    ways += [lambda: model.save_to_preset(tmp_path / "preset")] if attribute == "tokenizer" else []
    for way in ways:
        with pytest.raises(ValueError, match=message):
            way()
    assert not list(tmp_path.iterdir())


@once
def test_a_preset_does_not_store_frozen_layers(tmp_path):
    model = image_classifier()
    freeze_the_stem(model)
    model.save_to_preset(tmp_path / "preset")
    again = keras_jamba.DHCJamba.from_preset(tmp_path / "preset")
    assert len(again.trainable_variables) == len(image_classifier().trainable_variables)


@once
def test_freezing_a_model_keeps_its_prompt_states_valid():
    model = language_model()
    prompt = model.prefill([1, 2, 3])
    model.backbone.trainable = False
    assert len(model.generate([1, 2, 3, 4], max_new_tokens=2, state=prompt)) == 6

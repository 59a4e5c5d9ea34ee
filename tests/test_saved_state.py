"""What a model or layer that was saved, pickled, copied or cloned still knows: all that `fit` and `generate` use."""

import copy
import pickle

import keras
import numpy as np
import pytest
from checks import numpy, once
from keras import ops

import keras_jamba
from keras_jamba import layers
from keras_jamba.tokenizers import ByteTokenizer

TINY = dict(d_model=8, num_layers=2, mamba_ratio=1, num_experts=2, num_experts_per_token=1, d_ff=6, num_heads=2)
TINY |= dict(d_state=4, dt_rank=1)
BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 64, (2, 6)).astype("int32")
IMAGES = RNG.integers(0, 256, (2, 8, 8, 1)).astype("uint8")
FEATURES = RNG.standard_normal((2, 6, 8)).astype("float32")
CLASSES = np.array([0, 1])
LOGITS_LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CATEGORIES = dict(pixel_range=(0, 255), class_names=("cat", "dog", "owl"))


# Models, examples and how to compile: {kind: (make, x, y, loss)}.


def language_model(**given):
    return keras_jamba.JambaCausalLM(vocab_size=259, **TINY | given)


def backbone(**given):
    return keras_jamba.JambaBackbone(**TINY | given)


def text_classifier(**given):
    return keras_jamba.JambaClassifier(vocab_size=259, num_classes=3, **TINY | given)


def image_classifier(**given):
    return keras_jamba.DHCJamba(3, (8, 8, 1), **TINY | CATEGORIES | given)


MODELS = {
    "language model": (language_model, IDS, np.roll(IDS, -1, 1), "auto"),
    "backbone": (backbone, FEATURES, FEATURES[:, ::-1], "mse"),
    "classifier of texts": (text_classifier, IDS, CLASSES, "auto"),
    "classifier of images": (image_classifier, IMAGES, CLASSES, LOGITS_LOSS),
}


def saved(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


WITH_WEIGHTS = {
    "keras": saved,
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, folder: copy.deepcopy(model),
}
WAYS = WITH_WEIGHTS | {
    "clone": lambda model, folder: keras.models.clone_model(model),
    "config": lambda model, folder: type(model).from_config(model.get_config()),
}


def ways_of(model):
    """Keras makes a plain functional model of the clone of a functional one."""
    functional = isinstance(model, keras_jamba.DHCJamba)
    return {name: way for name, way in WAYS.items() if not (functional and name == "clone")}


# What there is to compare


def frozen(model):
    """What is trained, layer by layer and variable by variable."""
    found = [(each.name, each.trainable) for each in model._flatten_layers()]
    # Weights in few bits stand before statistics or behind them.
    return found + sorted((v.path, v.trainable) for v in model.weights)


def description(model):
    """All that can be read off without running it."""
    inner = list(model._flatten_layers())
    return {
        "class": type(model),
        "config": without_numbers(model.get_config()),
        "frozen": frozen(model),
        "trained": [v.path for v in model.trainable_variables],
        "policies": [each.dtype_policy.name for each in inner],
        "dtypes": [(each.compute_dtype, each.variable_dtype) for each in inner],
        "stored": {v.path: (v.dtype, tuple(v.shape)) for v in model.weights},
        "bits": [each.quantization_mode for each in inner],
        "adapters": [(each.lora_rank, each.lora_alpha) for each in inner if hasattr(each, "lora_rank")],
        "attributes": {name: getattr(model, name, None) for name in ("pixel_range", "class_names", "block_pattern")},
    }


def without_numbers(config):
    """A config without the numbers by which Keras finds shared objects in a file."""
    if not isinstance(config, dict):
        return config
    return {name: without_numbers(x) for name, x in config.items() if name != "shared_object_id"}


def files(model):
    """What of a text model lies in files of their own."""
    tokenizer = getattr(model, "tokenizer", None)
    return {
        "tokenizer": None if tokenizer is None else (type(tokenizer), vars(tokenizer)),
        "generation_config": getattr(model, "generation_config", None),
    }


def compilation(model):
    """All that `compile` decides, and the optimizer with its slots."""
    if not model.compiled:
        return {"compiled": False, "optimizer": model.optimizer, "sampler": plain(getattr(model, "sampler", None))}
    optimizer = model.optimizer
    return {
        "config": model.get_compile_config(),
        "optimizer": (type(optimizer), optimizer.get_config(), len(optimizer.variables)),
        "jit_compile": model.jit_compile,
        "run_eagerly": model.run_eagerly,
        "steps_per_execution": model.steps_per_execution,
        "metrics": model.metrics_names,
        "own metrics": [metric.name for metric in model.metrics],
        "loss": plain(model.loss),
        "sampler": plain(getattr(model, "sampler", None)),
    }


def plain(x):
    return x if x is None or isinstance(x, (str, float)) else keras.saving.serialize_keras_object(x)


def state(model):
    """Values: weights, random states, and the slots of the optimizer."""
    weights = {v.path: v for v in model.weights}
    # Keras numbers the others by what else the process has made. Without dropout nothing is drawn.
    draws = model.get_config()["dropout"] or model.get_config()["drop_path"]
    seeds = [v for v in model.variables if v.path not in weights and draws]
    slots = model.optimizer.variables if model.optimizer is not None else []
    found = weights | dict(enumerate((*seeds, *slots)))
    return {name: numpy(v.value) for name, v in found.items()}


def check_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def check_comes_back(model, tmp_path):
    expected, beside = (description(model), files(model)), compilation(model)
    for name, way in ways_of(model).items():
        again = way(model, tmp_path)
        assert description(again) == expected[0], name
        if name in WITH_WEIGHTS:
            assert files(again) == expected[1], name
            check_same(state(again), state(model))
        if name != "config":
            found = compilation(again)
            assert {kind: x for kind, x in found.items() if beside[kind] != x} == {}, name


# How a model is changed before


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
# {name: (how it is changed, the kinds of models)}
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
def test_an_uncompiled_model_comes_back_as_it_was(change, kind, tmp_path):
    model = MODELS[kind][0]()
    CHANGES[change][0](model)
    check_comes_back(model, tmp_path)


@once
@pytest.mark.parametrize(("options", "kind"), pairs(OPTIONS))
def test_policies_and_options_come_back(options, kind, tmp_path):
    check_comes_back(MODELS[kind][0](**OPTIONS[options][0]), tmp_path)


@once
def test_the_clone_that_keras_makes_of_a_functional_model_is_frozen_as_it_was():
    model = image_classifier()
    freeze_the_stem(model)
    freeze_a_variable(model)
    clone = keras.models.clone_model(model)
    assert frozen(clone)[1:] == frozen(model)[1:] and len(clone.trainable_variables) == len(model.trainable_variables)


# Compiled models


def compiled(kind, **given):
    """A model of a kind as its users compile it, with the slots of the optimizer."""
    make, _, _, loss = MODELS[kind]
    options = {name: given.pop(name) for name in ("dtype",) if name in given}
    model = make(**options)
    model.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": loss} | given)
    model.optimizer.build(model.trainable_variables)
    return model


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
def test_a_compiled_model_comes_back_compiled_as_it_was(kind, given, tmp_path):
    model = compiled(kind, **given)
    expected = compilation(model)
    for name, way in ways_of(model).items():
        if name != "config":
            found = compilation(way(model, tmp_path))
            assert {part: (x, expected[part]) for part, x in found.items() if x != expected[part]} == {}, name


@pytest.mark.parametrize(
    ("jit_compile", "compiled_on", "expected"),
    [("auto", None, "auto"), (True, BACKEND, True), (False, BACKEND, False)]
    # Of another backend, or of a version that stored what "auto" was and not on which backend.
    + [(True, "another", "auto"), (False, "another", "auto"), (True, None, "auto"), (False, None, "auto")],
)
def test_jit_compile_holds_on_the_backend_that_it_was_given_on(jit_compile, compiled_on, expected):
    usual = compiled("backbone", jit_compile="auto").jit_compile
    stored = keras.saving.serialize_keras_object(compiled("backbone", jit_compile=jit_compile))
    assert stored["config"].pop("compiled_on", None) == (None if jit_compile == "auto" else BACKEND)
    stored["config"] |= {} if compiled_on is None else {"compiled_on": compiled_on}
    again = keras.saving.deserialize_keras_object(stored)
    assert again.jit_compile == (usual if expected == "auto" else expected)
    assert again.get_compile_config()["jit_compile"] == expected


@once
def test_a_model_that_is_loaded_without_compiling_generates_as_before(tmp_path):
    model = compiled("language model", sampler=keras_jamba.Sampler(top_k=3, seed=1))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert not again.compiled and again.sampler.get_config() == model.sampler.get_config()


@once
def test_a_tokenizer_within_a_model_of_ones_own_comes_back(tmp_path):
    inner, inputs = language_model(), keras.Input((None,), dtype="int32")
    inner.tokenizer = ByteTokenizer(add_bos=False)
    model = keras.Model(inputs, inner(inputs))
    for way in WITH_WEIGHTS.values():
        assert vars(way(model, tmp_path).layers[-1].tokenizer) == {"add_bos": False}


# Behaviour: {kind: (options, change, compile, way)}. Each kind goes one way: each step is compiled.

# Keras' dropout on PyTorch draws from the generator of the process, drop_path from that of the block.
DROPS = dict(dropout=0.0 if BACKEND == "torch" else 0.2, drop_path=0.2)
STEPS = {
    "language model": ({}, adapt_in("int8"), dict(sampler=keras_jamba.Sampler(top_k=3, seed=1)), "checkpoint"),
    "classifier of images": (DROPS, freeze_the_stem, dict(metrics=["accuracy"]), "pickle"),
    "backbone": (dict(dtype="mixed_bfloat16"), freeze_a_layer, dict(weighted_metrics=["mae"]), "deepcopy"),
    "classifier of texts": (dict(gradient_checkpointing=True), freeze_a_variable, {}, "keras"),
}


@pytest.mark.parametrize("kind", STEPS)
def test_the_next_step_of_training_is_that_of_the_model_before(kind, tmp_path):
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


# Layers in models of one's own


class Mixer(keras.layers.Layer):
    """Somebody's own mixer, with layers that have names by Keras."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = keras.layers.Dense(8), keras.layers.Dense(8)

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x):
        return self.second(self.first(x))


keras.saving.register_keras_serializable("tests")(Mixer)
GRID, SEQUENCE = (4, 4, 8), (5, 8)
LAYERS = {
    "MambaLayer": (lambda: layers.MambaLayer(8, d_state=4, mixer_rms_norm=True), SEQUENCE, ["ssm"]),
    "GatedConvLayer": (lambda: layers.GatedConvLayer(8, bidirectional=True), SEQUENCE, ["backward_conv"]),
    "AttentionLayer": (lambda: layers.AttentionLayer(8, 2), SEQUENCE, ["k_proj", "v_proj"]),
    "FeedForward": (lambda: layers.FeedForward(8), SEQUENCE, ["up_proj"]),
    "MoELayer": (lambda: layers.MoELayer(8, 2, d_ff=4), SEQUENCE, ["router"]),
    "JambaBlock": (
        lambda: layers.JambaBlock(layers.MambaLayer(8), layers.FeedForward(8)),
        SEQUENCE,
        ["mixer/in_proj", "mixer_norm"],
    ),
    "JambaBlock of a mixer of one's own": (lambda: layers.JambaBlock(Mixer(), None), SEQUENCE, ["mixer/second"]),
    "SpatialEncoder": (lambda: layers.SpatialEncoder(8), GRID, ["norms"]),
    "PatchEncoder": (lambda: layers.PatchEncoder(8), GRID, ["projection"]),
    "FrameTokens": (lambda: layers.FrameTokens(8), (2, *GRID), ["projection"]),
    "SequencePooling": (lambda: layers.SequencePooling(), SEQUENCE, ["score"]),
    "JambaBackbone": (backbone, SEQUENCE, ["blocks/mixer"]),
    "DHCJamba": (lambda: image_classifier(pixel_range=None), (8, 8, 1), ["encoder", "backbone/final_norm"]),
}


def by_type(layer):
    """What is trained, without the names and paths that depend on what else was built."""
    found = []
    for each in layer._flatten_layers():
        own = each._trainable_variables + each._non_trainable_variables
        found.append((type(each).__name__, each.trainable, sorted((v.name, v.trainable) for v in own)))
    return found


def inner(layer, path):
    """The layers at a path of attributes, of which a list is its first."""
    for name in path.split("/"):
        layer = getattr(layer, name)
        layer = layer[0] if isinstance(layer, (list, tuple)) else layer
    return layer


def within_functional(layer, shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


KINDS = {
    "functional": within_functional,
    "sequential": lambda layer, shape: keras.Sequential([keras.Input(shape), layer]),
}


@once
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_frozen_in_a_layer_of_a_model_of_ones_own_stays_so(name, kind, tmp_path):
    make, shape, paths = LAYERS[name]
    layer = make()
    model = KINDS[kind](layer, shape)
    count = len(model.trainable_variables)
    for path in paths:
        inner(layer, path).trainable = False
    # One variable more, of a layer that is not frozen.
    others = [v for v in model.trainable_variables if not any(v is w for p in paths for w in inner(layer, p).weights)]
    for variable in others[-1:]:
        variable.trainable = False
    assert len(model.trainable_variables) < count
    for way in (*WITH_WEIGHTS.values(), WAYS["clone"]):
        assert by_type(way(model, tmp_path).layers[-1]) == by_type(layer)


@once
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_is_frozen_as_a_whole_stays_so(name, tmp_path):
    make, shape, _ = LAYERS[name]
    layer = make()
    model = within_functional(layer, shape)
    layer.trainable = False
    assert model.trainable_variables == []
    for way in (*WITH_WEIGHTS.values(), WAYS["clone"]):
        again = way(model, tmp_path)
        assert (again.trainable_variables, by_type(again.layers[-1])) == ([], by_type(layer))


def test_what_is_frozen_by_the_constructor_is_not_trained():
    layer = layers.MambaLayer(8, trainable=False)
    model = within_functional(layer, SEQUENCE)
    assert model.trainable_variables == [] and not layer.in_proj.trainable
    layer.trainable = True
    assert len(model.trainable_variables) == len(layer.weights)


def test_configs_say_nothing_where_nothing_is_frozen_and_old_ones_load():
    model = backbone()
    assert not {"trainable_state", "adapters", "sampler", "compiled_on"} & set(model.get_config())
    config = layers.MambaLayer(8).get_config()
    assert "trainable_state" not in config
    # What Keras stored of a layer that was frozen as a whole.
    again = layers.MambaLayer.from_config(config | {"trainable": False})
    assert within_functional(again, SEQUENCE).trainable_variables == []


def test_what_is_thawed_before_it_is_built_stays_so():
    layer = layers.MambaLayer(8)
    layer.build((None, *SEQUENCE))
    layer.in_proj.trainable = False
    again = layers.MambaLayer.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    again.trainable = False  # TensorFlow passes over a value that an attribute has already
    again.trainable = True
    again.build((None, *SEQUENCE))
    assert len(again.trainable_variables) == len(again.weights)


@once
def test_a_state_of_another_layer_is_named():
    config = layers.MambaLayer(8).get_config() | {"trainable_state": {"layers": {"q_proj": False}}}
    with pytest.raises(ValueError, match="must name layers and variables of"):
        layers.MambaLayer.from_config(config).build((None, *SEQUENCE))


# What cannot be saved


class Letters:
    """A tokenizer that has no file."""

    eos_token_id = None

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class SavedLetters(Letters):
    """One whose file nobody reads."""

    def save(self, folder):
        (folder / "letters.txt").write_text("abc")


class Draws:
    """A sampler that has no config."""

    def get_next_token(self, probabilities):
        return ops.argmax(probabilities, axis=-1)


@once
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("tokenizer", Letters(), "saved by its save"),
        ("tokenizer", SavedLetters(), "load_tokenizer returns"),
        ("sampler", Draws(), "saved by its get_config"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(attribute, value, message, tmp_path):
    model = language_model()
    setattr(model, attribute, value)
    ways = [lambda: model.save(tmp_path / "model.keras"), lambda: pickle.dumps(model), lambda: copy.deepcopy(model)]
    ways += [lambda: model.save_to_preset(tmp_path / "preset")] if attribute == "tokenizer" else []
    for way in ways:
        with pytest.raises(ValueError, match=message):
            way()
    assert not list(tmp_path.iterdir())


@once
def test_a_preset_says_nothing_of_what_was_frozen(tmp_path):
    model = image_classifier()
    freeze_the_stem(model)
    model.save_to_preset(tmp_path / "preset")
    again = keras_jamba.DHCJamba.from_preset(tmp_path / "preset")
    assert len(again.trainable_variables) == len(image_classifier().trainable_variables)


@once
def test_what_is_frozen_is_no_part_of_what_a_state_of_a_prompt_belongs_to():
    model = language_model()
    prompt = model.prefill([1, 2, 3])
    model.backbone.trainable = False
    assert len(model.generate([1, 2, 3, 4], max_new_tokens=2, state=prompt)) == 6

"""Small models, the ways to save and copy them, and the properties compared afterwards."""

import copy
import pickle

import keras
import numpy as np
from checks import numpy

import keras_jamba

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


# Models, examples and losses: {kind: (make, x, y, loss)}.


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
    """Returns the ways to copy `model`. `clone_model` turns a functional subclass into a plain functional model."""
    functional = isinstance(model, keras_jamba.DHCJamba)
    return {name: way for name, way in WAYS.items() if not (functional and name == "clone")}


# Compared properties


def frozen(model):
    """Returns the `trainable` flag of each layer and each weight."""
    found = [(each.name, each.trainable) for each in model._flatten_layers()]
    # Sorted, because quantized weights may come before or after the statistics.
    return found + sorted((v.path, v.trainable) for v in model.weights)


def description(model):
    """Returns the properties of a model that need no call."""
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
    """Returns a config without the ids by which Keras finds shared objects in a file."""
    if not isinstance(config, dict):
        return config
    return {name: without_numbers(x) for name, x in config.items() if name != "shared_object_id"}


def files(model):
    """Returns the properties of a text model that a preset stores in separate files."""
    tokenizer = getattr(model, "tokenizer", None)
    return {
        "tokenizer": None if tokenizer is None else (type(tokenizer), vars(tokenizer)),
        "generation_config": getattr(model, "generation_config", None),
    }


def compilation(model):
    """Returns the arguments of `compile`, and the optimizer with its number of variables."""
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
    """Returns the values of weights, random states and optimizer variables."""
    weights = {v.path: v for v in model.weights}
    # Seed states have no stable paths, because Keras numbers them per process. Without dropout nothing is drawn.
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
    """Checks that every way to save or copy `model` restores its properties and values."""
    expected, compiled = (description(model), files(model)), compilation(model)
    for name, way in ways_of(model).items():
        again = way(model, tmp_path)
        assert description(again) == expected[0], name
        if name in WITH_WEIGHTS:
            assert files(again) == expected[1], name
            check_same(state(again), state(model))
        if name != "config":
            found = compilation(again)
            assert {kind: x for kind, x in found.items() if compiled[kind] != x} == {}, name

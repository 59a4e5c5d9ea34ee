"""The small models of `tests/fixtures`, with the same weights on every backend, and the recorded properties."""

import hashlib
import json
from pathlib import Path

import keras
import numpy as np
from checks import jitted, numpy

import keras_jamba
from keras_jamba import layers, training

FORMATS, PRESETS = (Path(__file__).parent.parent / "fixtures" / name for name in ("formats", "presets"))

SIZES = dict(d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, d_ff=6, d_state=4, dt_rank=1)
EXPERTS = dict(num_experts=2, num_experts_per_token=1, moe_offset=0)
MAMBA = dict(num_layers=1, mamba_ratio=None, moe_frequency=0, d_ff=0, mixer_rms_norm=False)
SPECIAL = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
# Routing statistics: recorded in weights, without an effect on outputs.
STATISTICS = ("usage", "drop_rate", "aux_loss")
# Constructor arguments per quantization mode. In int4, a column of more than 64 rows has two scales.
QUANTIZED = {"int8": {}, "int4": dict(num_layers=1, d_ff=70), "experts_int8": dict(num_layers=1)}

RNG = np.random.default_rng(0)
IDS = RNG.integers(3, 32, (2, 6)).astype("int32")
PROMPT = [1, 5, 9, 2, 7]
IMAGES = RNG.random((2, 8, 8, 1)).astype("float32")
BYTES = RNG.integers(0, 256, (4, 8, 8, 1)).astype("uint8")
CLIPS = RNG.random((2, 3, 4, 4, 1)).astype("float32")
LABELS = np.eye(3, dtype="float32")[[0, 2, 1, 2]]
TEXT = "Ein naïver Text, 文"
CHAT = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]


# Models


def filled(model, seed=0):
    """Assigns seeded weights, none of them neutral, so that any mistake changes the outputs."""
    rng = np.random.default_rng(seed)
    for variable in sorted(model.weights, key=lambda variable: variable.path):
        values, name = rng.normal(size=variable.shape), variable.path.rsplit("/", 1)[-1]
        if name in ("scale", "gamma", "D", "moving_variance"):
            variable.assign(1 + 0.2 * np.tanh(values))
        elif name == "dt_bias":
            variable.assign(0.3 * values - 3)
        elif name not in ("A_log", *STATISTICS):
            fan_in = variable.shape[-2] if len(variable.shape) > 1 else 10
            variable.assign(2 * values * fan_in**-0.5)
    return model


def image_classifier(seed=0):
    given = SIZES | EXPERTS | dict(num_layers=1, downsample=2, scan_order="snake", class_names=("cat", "dog", "owl"))
    return filled(keras_jamba.DHCJamba(3, (8, 8, 1), **given), seed)


def byte_classifier(seed=0):
    """Returns a classifier of integer images, to be trained."""
    given = SIZES | EXPERTS | dict(num_layers=1, stem="patchify")
    given |= dict(pixel_range=(0, 255), class_names=("cat", "dog", "owl"))
    return filled(keras_jamba.DHCJamba(3, (8, 8, 1), **given), seed)


def clip_classifier(seed=0):
    given = SIZES | MAMBA | dict(direction="bidirectional", mixer_rms_norm=True)
    given |= dict(stem="patchify", tokens="frames", readout="seqpool")
    return filled(keras_jamba.DHCJamba(3, (3, 4, 4, 1), **given), seed)


def language_model(seed=0, **given):
    return filled(keras_jamba.JambaCausalLM(32, **SIZES | EXPERTS | SPECIAL | given), seed)


def mamba_model(seed=0):
    """Returns a model that transformers loads as Mamba."""
    return filled(keras_jamba.JambaCausalLM(32, tie_embeddings=True, **SIZES | MAMBA), seed)


def text_classifier(seed=0):
    given = SIZES | EXPERTS | SPECIAL | dict(num_layers=1, mamba_ratio=0)
    return filled(keras_jamba.JambaClassifier(288, num_classes=3, **given), seed)


def adapted(model, seed=1):
    """Adds noise to all trainable variables of an adapted model, because half of the adapters begin as zeros."""
    rng = np.random.default_rng(seed)
    for variable in sorted(model.trainable_variables, key=lambda variable: variable.path):
        variable.assign(variable + 0.2 * rng.normal(size=variable.shape))
    return model


def own_model(seed=2):
    """Returns a functional model that a user builds from the layers."""
    clips = keras.Input((3, 4, 4, 1))
    x = layers.PatchEncoder(8, 4)(clips)
    x = layers.FrameTokens(8)(x)
    x = layers.GatedConvLayer(8)(x)
    router = layers.Router(3, num_experts_per_token=2)
    x = layers.JambaBlock(layers.MambaLayer(8, d_state=4), layers.MoELayer(8, d_ff=6, router=router), drop_path=0.1)(x)
    x = layers.AttentionLayer(8, num_heads=2, attention_window=2)(x)
    x = keras_jamba.JambaBackbone(**SIZES | MAMBA)(x)
    x = layers.FeedForward(8, 6)(x)
    return filled(keras.Model(clips, keras.layers.Dense(3)(layers.LastReadout()(x))), seed)


def compiled(model):
    """Returns `model` compiled with the package's optimizer and schedule, and with label smoothing."""
    optimizer = training.optimizer(model, steps=8, learning_rate=1e-2, use_ema=True)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def probes():
    """Returns the callbacks whose log columns exist on every device."""
    return [training.ExpertUsage(), training.GradientNorm(), training.LearningRate()]


# Recorded properties


def digest(x):
    """Returns a hash of the values of an array. Integers count as int64, because their width differs per backend."""
    x = np.asarray(x)
    x = x.astype("int64") if x.dtype.kind in "iu" and x.itemsize > 1 else x
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def described(model, statistics=True):
    """Returns `{path: dtype, shape and digest}` of the weights."""
    found = {v.path.removeprefix(f"{model.name}/"): v for v in model.weights}
    return {path: _description(v) for path, v in found.items() if statistics or not path.endswith(STATISTICS)}


def in_order(model):
    """Returns the names and descriptions of the weights in order, for a model whose paths change in loading."""
    return [f"{v.name} {_description(v)}" for v in model.weights]


def _description(variable):
    return f"{variable.dtype} {tuple(variable.shape)} {digest(numpy(variable.value))}"


def digests(arrays):
    return [digest(x) for x in arrays]


def seeds(model):
    """Returns the digests of the states of the layers' seed generators."""
    weights = {id(v) for v in model.weights}
    return digests(numpy(v.value) for v in model.variables if id(v) not in weights)


def slots(model):
    """Returns the digests of all optimizer variables."""
    return digests(numpy(v.value) for v in model.optimizer.variables)


def logits(model, inputs):
    return numpy(jitted(model)(inputs))


def written(model, **given):
    """Returns the tokens that a language model generates after `PROMPT`."""
    return model.generate([PROMPT], max_new_tokens=6, stop_token_ids=None, **given)[0]


def read_numbers(file):
    return json.loads(file.read_text("utf-8"))


def write_numbers(file, numbers):
    """Writes JSON with one line per dict key and per array."""
    file.write_text(_text(numbers) + "\n", "utf-8")


def _text(x, indent=" "):
    if isinstance(x, dict):
        lines = [f"{indent}{json.dumps(key)}: {_text(value, indent + ' ')}" for key, value in x.items()]
        return "{\n" + ",\n".join(lines) + "\n" + indent[1:] + "}"
    if isinstance(x, np.ndarray):
        # The fewest digits that distinguish a float32 from its neighbours.
        x = x.astype(str).astype(float).tolist() if x.dtype == "float32" else x.tolist()
    return json.dumps(x)

"""Models, images, ids and functions that the mistakes use."""

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

import keras_jamba
from keras_jamba.models import JambaBackbone

RIGHT = "the right numbers"
NAN = "NaN, or an error where values can be read"
SIZES = dict(d_model=8, num_layers=2, mamba_ratio=1, moe_frequency=0, num_heads=2, d_ff=8)


class Mistake(NamedTuple):
    """One mistake.

    Attributes:
        entry: the entry point.
        name: the mistake in a few words.
        outcome: a pattern that the error matches, RIGHT or NAN. With RIGHT, `run` returns the result and the expected
            result. With NAN, `run` returns a number that must be NaN.
        run: function of a `Subjects` that makes the mistake.
    """

    entry: str
    name: str
    outcome: str
    run: Any


class Subjects:
    """The models that the mistakes use. Each property is created once."""

    @functools.cached_property
    def images(self):
        return self.classifier()

    @functools.cached_property
    def bytes(self):
        model = self.classifier(pixel_range=(0, 255))
        for ours, theirs in zip(model.weights, self.images.weights, strict=True):
            ours.assign(theirs)
        return model

    @functools.cached_property
    def clips(self):
        return self.classifier(image_shape=(4, 8, 8, 1), tokens="frames")

    def classifier(self, **given):
        defaults = dict(num_classes=3, image_shape=(8, 8, 1), downsample=4, stem="patchify")
        model = keras_jamba.DHCJamba(**SIZES | defaults | given)
        model.compile(keras.optimizers.SGD(0.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    @functools.cached_property
    def text(self):
        model = keras_jamba.JambaCausalLM(11, **SIZES)
        model.compile(keras.optimizers.SGD(0.0))
        return model

    def compiled_in(self, dtype, **given):
        model = keras_jamba.JambaCausalLM(11, **SIZES, dtype=dtype)
        model.compile(keras.optimizers.SGD(0.0), **given)
        return model

    @functools.cached_property
    def text_with_tokenizer(self):
        model = keras_jamba.JambaCausalLM(259, **SIZES)
        model.tokenizer = keras_jamba.tokenizers.ByteTokenizer()
        return model

    @functools.cached_property
    def text_classifier(self):
        model = keras_jamba.JambaClassifier(11, num_classes=3, **SIZES)
        model.compile(keras.optimizers.SGD(0.0))
        return model

    @functools.cached_property
    def backbone(self):
        return JambaBackbone(**SIZES)

    @functools.cached_property
    def folder(self):
        return Path(tempfile.mkdtemp())

    def preset(self):
        folder = self.folder / "preset"
        if not folder.exists():
            self.images.save_to_preset(folder)
        return folder


def pictures(count=4, shape=(8, 8, 1)):
    return np.random.default_rng(0).random((count, *shape), "float32")


def ids(*shape, high=11):
    return np.random.default_rng(0).integers(0, high, shape or (2, 6)).astype("int32")


LABELS = np.array([0, 1, 2, 0])
IDS = ids()
BAD_ID = np.where(np.arange(6) == 3, 11, IDS)


def numbers(x):
    return keras.ops.convert_to_numpy(keras.ops.stop_gradient(x))


def fit(model, x, y=None, **given):
    return model.fit(x, y, verbose=0, shuffle=False, **given).history["loss"][0]


def batches(*given):
    """Yields batches like a data pipeline."""
    yield from given


def token_loss(model, x, y, weights):
    """Returns the weighted mean cross-entropy per token, in float64."""
    logits = numbers(model({"token_ids": x})).astype("float64")
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logits, y[..., None], -1)[..., 0]
    weights = np.broadcast_to(weights, losses.shape)
    return (losses * weights).sum() / weights.sum()


def without(module, function):
    """Returns the result of `function` in an environment without `module`."""
    hidden = {name: x for name, x in sys.modules.items() if name == module or name.startswith(f"{module}.")}
    for name in hidden:
        del sys.modules[name]
    sys.modules[module] = None
    try:
        return function()
    finally:
        del sys.modules[module]
        sys.modules.update(hidden)


UINT8 = (pictures() * 255).astype("uint8")

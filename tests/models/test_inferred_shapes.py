"""Keras infers the shapes of a model on PyTorch's meta device: no layer may need values there.

Otherwise Keras runs the complete model before the first step of `fit`, with all logits in memory.
"""

import keras
import numpy as np
import pytest

import keras_jamba
from keras_jamba import _backend

if keras.backend.backend() != "torch":
    pytest.skip("about PyTorch's meta device", allow_module_level=True)

from keras.src.backend.torch import core

from keras_jamba._backend.torch import _triton

MARKS = dict(segment_ids="int32", padding_mask="bool", reset_mask="bool")
KINDS = [(), *((name,) for name in MARKS), tuple(MARKS)]
OPTIONS = {
    "plain": {},
    "windows": dict(attention_window=8, attention_sinks=2, use_rope=True),
    "experts": dict(num_experts=4, moe_frequency=2),
}


def language_model(options):
    return keras_jamba.JambaCausalLM(50, d_model=32, num_layers=2, mamba_ratio=1, num_heads=2, **OPTIONS[options])


@pytest.fixture
def no_computation(monkeypatch):
    """After an error on the meta device, Keras runs the model on the default device."""
    scope = core.device_scope
    monkeypatch.setattr(core, "device_scope", lambda name: scope(name) if name == "meta" else pytest.fail(str(name)))


def symbolic(shape, dtype="int32"):
    return keras.KerasTensor(shape, dtype)


@pytest.mark.parametrize("tokens", [40, 600])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_language_model_needs_no_values_for_its_shapes(platform, options, tokens, no_computation, monkeypatch):
    model = language_model(options)
    if platform == "gpu":
        monkeypatch.setattr(_triton, "why_not_here", lambda: None)
        monkeypatch.setattr(_triton, "_device", lambda: (132, "", True, None))
        monkeypatch.setattr(_backend.tensors, "platform", lambda x=None: "gpu")
    for kind in KINDS:
        given = dict(token_ids=symbolic((2, tokens))) | {name: symbolic((2, tokens), MARKS[name]) for name in kind}
        logits, _ = keras.src.backend.compute_output_spec(lambda x: model(x, return_state=True), given)
        assert tuple(logits.shape) == (2, tokens, 50)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_first_step_of_fit_computes_nothing_else(options, no_computation):
    ids = np.ones((2, 17), "int32")
    given = dict(token_ids=ids[:, :-1], segment_ids=np.repeat([[0, 1]], 8, axis=1).repeat(2, axis=0))
    model = language_model(options)
    model.compile("sgd")
    assert np.isfinite(model.fit(given, ids[:, 1:], verbose=0).history["loss"]).all()


def test_the_first_step_of_an_image_model_computes_nothing_else(no_computation):
    model = keras_jamba.DHCJamba(5, image_shape=(16, 16, 3), d_model=32, num_layers=2, mamba_ratio=1, num_experts=4)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(np.zeros((2, 16, 16, 3), "float32"), np.zeros(2, "int32"), verbose=0).history
    assert np.isfinite(history["loss"]).all()

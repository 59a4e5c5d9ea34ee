"""Generation needs nothing of a model but the `LanguageModel` protocol, and `JambaCausalLM` has its signatures."""

import inspect
import types

import keras
import numpy as np
import pytest
from checks import once

from keras_jamba import JambaCausalLM
from keras_jamba.generation import PromptLookup, api
from keras_jamba.generation.protocol import LanguageModel

# The same on every backend.
pytestmark = once

METHODS = [name for name, value in vars(LanguageModel).items() if inspect.isfunction(value) and name[0] != "_"]
OWNERS = LanguageModel, JambaCausalLM
ATTRIBUTES = list(LanguageModel.__annotations__)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_has_the_signature_of_the_protocol(name):
    parameters = lambda owner: inspect.signature(getattr(owner, name)).parameters.values()  # noqa: E731
    expected, found = ([(each.name, each.kind, each.default) for each in parameters(owner)] for owner in OWNERS)
    assert found == expected


def language_model():
    keras.utils.set_random_seed(0)
    return JambaCausalLM(vocab_size=12, d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=2, d_ff=8)


@pytest.mark.parametrize(
    "options", [{}, {"assistant": PromptLookup()}, {"state": True}], ids=["plain", "draft", "state"]
)
def test_generation_needs_only_the_protocol(options):
    model, prompt = language_model(), [3, 4, 5, 3, 4]
    only = types.SimpleNamespace(**{name: getattr(model, name) for name in METHODS + ATTRIBUTES})
    expected = model.generate(prompt, max_new_tokens=6, stop_token_ids=None)
    if "state" in options:
        options = {"state": api.prefill(only, prompt[:3], 2)}
    found = api.generate(only, prompt, False, 2, max_new_tokens=6, stop_token_ids=None, **options)
    np.testing.assert_array_equal(found, expected)

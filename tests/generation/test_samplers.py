"""The sampler against the same rules in NumPy."""

import keras
import numpy as np
import pytest
from checks import numpy

from keras_jamba import Sampler
from keras_jamba.generation.samplers import sampler_of

LOGITS = np.random.default_rng(0).normal(size=(4, 12)).astype("float32") * 2
SEEN = np.random.default_rng(1).random((4, 12)) < 0.4


def expected_probabilities(logits, seen, penalty=1.0, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Returns float64 probabilities after each rule, in the order of transformers' warpers."""
    x = logits.astype("float64")
    x = np.where(seen, np.where(x < 0, x * penalty, x / penalty), x) / temperature
    if top_k:
        x[x < np.sort(x)[-top_k]] = -np.inf
    if top_p is not None:
        order = np.argsort(-x)
        p = np.exp(x[order] - x.max())
        p /= p.sum()
        x[order[(np.cumsum(p) - p) >= max(top_p, 1e-12)]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if min_p is not None:
        p[p < min_p * p.max()] = 0
    return p / p.sum()


RULES = [
    {},
    dict(temperature=0.5),
    dict(top_k=3),
    dict(top_p=0.7),
    dict(top_p=0.0),
    dict(min_p=0.2),
    dict(penalty=1.8, temperature=1.5, top_k=8, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_tokens_are_drawn_with_the_probabilities_of_the_rules(rules):
    given = {"repetition_penalty" if name == "penalty" else name: value for name, value in rules.items()}
    sampler, draws = Sampler(**given), 20000
    uniform = (np.arange(draws, dtype="float32") + 0.5) / draws  # evenly spaced: each frequency is exact up to one draw
    for row in range(4):
        logits, seen = np.repeat(LOGITS[row : row + 1], draws, 0), np.repeat(SEEN[row : row + 1], draws, 0)
        tokens = numpy(sampler.choose(keras.ops.convert_to_tensor(logits), keras.ops.convert_to_tensor(uniform), seen))
        share = np.bincount(tokens, minlength=12) / draws
        np.testing.assert_allclose(share, expected_probabilities(LOGITS[row], SEEN[row], **rules), atol=2e-4)


def test_temperature_zero_takes_the_most_likely_token():
    tokens = Sampler(temperature=0).choose(keras.ops.convert_to_tensor(LOGITS), None)
    np.testing.assert_array_equal(numpy(tokens), LOGITS.argmax(-1))


def test_uniform_numbers_depend_on_the_seed_and_stay_below_one():
    np.testing.assert_array_equal(Sampler(seed=4).uniforms(3, 2), Sampler(seed=4).uniforms(3, 2))
    assert not np.array_equal(Sampler().uniforms(3, 2), Sampler().uniforms(3, 2))
    assert Sampler(seed=0).uniforms(1000, 100).max() < 1


def test_the_highest_uniform_number_draws_a_possible_token():
    logits = np.array([[0.0, 1.0, -80.0]], "float32")
    top = keras.ops.convert_to_tensor(np.array([1 - 2**-20], "float32"))
    assert int(numpy(Sampler().choose(keras.ops.convert_to_tensor(logits), top))[0]) == 1


def test_samplers_have_names_and_survive_serialization():
    assert sampler_of("greedy").temperature == 0 and sampler_of("top_p").top_p == 0.9
    sampler = Sampler(1.2, 0.7, 5, 0.9, 0.1, 3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(sampler))
    assert again.get_config() == sampler.get_config()


@pytest.mark.parametrize(
    "given", [dict(temperature=-1), dict(top_k=0), dict(top_p=1.5), dict(min_p=-0.1), dict(repetition_penalty=0)]
)
def test_arguments_out_of_range_are_refused(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"{name} must be.*Received: {name}="):
        Sampler(**given)

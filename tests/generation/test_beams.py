"""Beam search against a reference over complete sequences, and against transformers."""

import keras
import numpy as np
import pytest
import torch
from checks import full, numpy, once
from tiny_text import SIZE, tiny
from transformers import JambaConfig, JambaForCausalLM

import keras_jamba
from keras_jamba import _backend
from keras_jamba.generation import BeamSampler
from keras_jamba.generation.samplers import sampler_of

PROMPTS = [[5, 6, 7, 5, 6], [3], [9, 8, 9]]
LENGTH, STOPS = 12, (22, 13)
NOT_ON_TENSORFLOW = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="all backends share the loop; the other two run this test"
)


@pytest.fixture(scope="module")
def model():
    return tiny(4)


@pytest.fixture(scope="module")
def log_probabilities(model):
    """Returns a function from at most four rows of tokens to the log probabilities of the next tokens."""
    step = lambda ids, mask: model.step({"token_ids": ids, "padding_mask": mask}, model.init_cache(4, 16))[0]  # noqa: E731
    run = _backend.compilation.jit_inference(step, model.variables)

    def log_probabilities(rows):
        ids, mask = np.zeros((4, 16), "int32"), np.zeros((4, 16), bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        logits = numpy(run(*map(keras.ops.convert_to_tensor, (ids, mask)))).astype("float64")[
            range(len(rows)), [len(row) - 1 for row in rows]
        ]
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    return log_probabilities


def beam_search(log_probabilities, prompt, limit, num_beams, length_penalty=1.0, early_stopping=False):
    """Returns the best sequence of new tokens, and the number of beams that ended before the limit."""
    running, pool, early = [(0.0, [])], [], 0
    for length in range(1, limit + 1):
        more = log_probabilities([prompt + new for _, new in running])
        scores = [s + x for (s, _), x in zip(running, more, strict=True)]
        beams = [
            (s[token], new + [token]) for s, (_, new) in zip(scores, running, strict=True) for token in range(SIZE)
        ]
        beams = sorted(beams, key=lambda beam: -beam[0])[: (1 + len(STOPS)) * num_beams]
        ended = [beam for beam in beams[:num_beams] if beam[1][-1] in STOPS or length == limit]
        early += length < limit and len(ended)
        pool = sorted(pool + [(s / length**length_penalty, new) for s, new in ended], key=lambda beam: -beam[0])
        pool = pool[:num_beams]
        running = [beam for beam in beams if beam[1][-1] not in STOPS and length < limit][:num_beams]
        best_length = limit if early_stopping == "never" and length_penalty > 0 else length
        full = len(pool) == num_beams
        if full and (
            early_stopping is True or not running or running[0][0] / best_length**length_penalty <= pool[-1][0]
        ):
            break
    return pool[0][1], early


@full("jax")
@pytest.mark.parametrize(
    "rules",
    [
        dict(num_beams=4, length_penalty=2.0, early_stopping="never"),
        pytest.param(dict(num_beams=2, length_penalty=-0.5, early_stopping=True), marks=NOT_ON_TENSORFLOW),
    ],
    ids=str,
)
def test_each_row_of_a_batch_equals_its_own_search(model, log_probabilities, rules):
    given = dict(max_length=LENGTH, stop_token_ids=STOPS, sampler=BeamSampler(**rules))
    found, early = model.generate(PROMPTS, **given), 0
    for prompt, row in zip(PROMPTS, found, strict=True):
        new, ended = beam_search(log_probabilities, prompt, LENGTH - len(prompt), **rules)
        assert row.tolist() == prompt + new
        early += ended
    assert early > 0
    if rules["num_beams"] == 4:  # compiles only the chunks of a prompt
        state = model.prefill(PROMPTS[0][:3])
        again = model.generate([PROMPTS[0], PROMPTS[0], PROMPTS[0][:3]], state=state, **given)
        np.testing.assert_array_equal(again[1], found[0])


@NOT_ON_TENSORFLOW
def test_one_beam_is_greedy_and_compile_keeps_the_sampler(model):
    given = dict(max_length=LENGTH, stop_token_ids=STOPS)
    greedy = model.generate(PROMPTS, **given)
    sampler = BeamSampler(num_beams=1, early_stopping="never")
    try:
        model.compile(sampler=sampler)
        kept = keras.saving.deserialize_keras_object(model.get_compile_config())["sampler"]
        found = model.generate(PROMPTS, **given)
    finally:
        model.compile()
    assert isinstance(kept, BeamSampler) and kept.get_config() == sampler.get_config()
    for row, expected in zip(found, greedy, strict=True):
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("eos", [[19, 22], pytest.param(None, marks=once)], ids=["eos", "no eos"])
def test_beams_match_transformers(tmp_path, eos):
    config = dict(vocab_size=23, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    config |= dict(num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4)
    torch.manual_seed(0)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=eos)
    other = JambaForCausalLM(JambaConfig(**config, **ids, use_mamba_kernels=False, initializer_range=0.6)).eval()
    other.save_pretrained(tmp_path)
    other.set_experts_implementation("eager")
    ours = keras_jamba.JambaCausalLM.from_preset(tmp_path)
    prompts = [[5, 9, 4], [11, 12, 13, 14, 15, 16], [7]]
    found = ours.generate(prompts, max_new_tokens=10, sampler=BeamSampler(num_beams=3))
    for prompt, row in zip(prompts, found, strict=True):
        expected = other.generate(torch.as_tensor([prompt]), max_new_tokens=10, num_beams=3, do_sample=False)[0]
        np.testing.assert_array_equal(row, expected.numpy())
    assert eos is None or min(len(row) - len(prompt) for row, prompt in zip(found, prompts, strict=True)) < 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: model.stream([1], sampler=BeamSampler(2)),
            r"num_beams=2\). Call generate, or pass sampler='gre",
        ),
        (
            lambda model: model.generate([1], sampler=BeamSampler(2), stop_strings="x"),
            r"Received: stop_strings=\['x'\]",
        ),
        (lambda model: BeamSampler(0), "num_beams must be an integer of at least 1"),
        (lambda model: BeamSampler(length_penalty="long"), "length_penalty must be a number"),
        (lambda model: BeamSampler(early_stopping="always"), "early_stopping must be True, False or 'never'"),
        (lambda model: BeamSampler(early_stopping=1), "early_stopping must be True, False or 'never'"),
        (lambda model: sampler_of(type("BeamSampler", (), {"num_beams": 5})()), r"Pass keras_jamba.*num_beams=5\)"),
    ],
)
def test_unsupported_beam_arguments_are_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@NOT_ON_TENSORFLOW
def test_an_extreme_length_penalty_still_returns_tokens(model):
    given = dict(max_new_tokens=48, stop_token_ids=None, strip_prompt=True)
    assert model.generate([PROMPTS[0]], sampler=BeamSampler(num_beams=2, length_penalty=-5.0), **given)[0].shape == (
        48,
    )

"""Beam search against one written out over whole sequences, and beside transformers."""

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
ELSEWHERE = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="the same loop on every backend; runs on the other two"
)


@pytest.fixture(scope="module")
def model():
    return tiny(4)


@pytest.fixture(scope="module")
def likely(model):
    """A function of at most four rows of tokens that gives the logarithms of the next ones' probabilities."""
    step = lambda ids, mask: model.step({"token_ids": ids, "padding_mask": mask}, model.init_cache(4, 16))[0]  # noqa: E731
    run = _backend.compilation.jit_inference(step, model.variables)

    def likely(rows):
        ids, mask = np.zeros((4, 16), "int32"), np.zeros((4, 16), bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        logits = numpy(run(*map(keras.ops.convert_to_tensor, (ids, mask)))).astype("float64")[
            range(len(rows)), [len(row) - 1 for row in rows]
        ]
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    return likely


def searched(likely, prompt, room, num_beams, length_penalty=1.0, early_stopping=False):
    """The best sequence of new tokens, and how many beams ended before they had to."""
    running, pool, early = [(0.0, [])], [], 0
    for length in range(1, room + 1):
        scores = [s + more for (s, _), more in zip(running, likely([prompt + new for _, new in running]), strict=True)]
        ways = [(s[token], new + [token]) for s, (_, new) in zip(scores, running, strict=True) for token in range(SIZE)]
        ways = sorted(ways, key=lambda way: -way[0])[: (1 + len(STOPS)) * num_beams]
        ended = [way for way in ways[:num_beams] if way[1][-1] in STOPS or length == room]
        early += length < room and len(ended)
        pool = sorted(pool + [(s / length**length_penalty, new) for s, new in ended], key=lambda way: -way[0])
        pool = pool[:num_beams]
        running = [way for way in ways if way[1][-1] not in STOPS and length < room][:num_beams]
        hoped = room if early_stopping == "never" and length_penalty > 0 else length
        full = len(pool) == num_beams
        if full and (early_stopping is True or not running or running[0][0] / hoped**length_penalty <= pool[-1][0]):
            break
    return pool[0][1], early


@full("jax")
@pytest.mark.parametrize(
    "rules",
    [
        dict(num_beams=4, length_penalty=2.0, early_stopping="never"),
        pytest.param(dict(num_beams=2, length_penalty=-0.5, early_stopping=True), marks=ELSEWHERE),
    ],
    ids=str,
)
def test_each_row_of_a_batch_is_the_best_of_its_own_search(model, likely, rules):
    given = dict(max_length=LENGTH, stop_token_ids=STOPS, sampler=BeamSampler(**rules))
    found, early = model.generate(PROMPTS, **given), 0
    for prompt, row in zip(PROMPTS, found, strict=True):
        new, ended = searched(likely, prompt, LENGTH - len(prompt), **rules)
        assert row.tolist() == prompt + new
        early += ended
    assert early > 0
    if rules["num_beams"] == 4:  # nothing more to compile but pieces of a prompt
        state = model.prefill(PROMPTS[0][:3])
        again = model.generate([PROMPTS[0], PROMPTS[0], PROMPTS[0][:3]], state=state, **given)
        np.testing.assert_array_equal(again[1], found[0])


@ELSEWHERE
def test_one_beam_is_greedy_and_stays_with_a_compiled_model(model):
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
def test_beams_are_those_of_transformers(tmp_path, eos):
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
def test_what_beams_cannot_do_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@ELSEWHERE
def test_a_penalty_that_makes_every_score_small_still_ends_with_tokens(model):
    given = dict(max_new_tokens=48, stop_token_ids=None, strip_prompt=True)
    assert model.generate([PROMPTS[0]], sampler=BeamSampler(num_beams=2, length_penalty=-5.0), **given)[0].shape == (
        48,
    )

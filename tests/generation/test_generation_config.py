"""The generation settings of a checkpoint decide the defaults of `generate`, as in transformers."""

import json

import keras
import numpy as np
import pytest
import torch
import transformers
from checks import full, numpy, once
from tiny_text import Letters, tiny
from transformers import JambaConfig, JambaForCausalLM

import keras_jamba
from keras_jamba.generation import BeamSampler, Sampler, generation_config
from keras_jamba.generation.generation_config import sampler_of_config
from keras_jamba.generation.request import make_request

PROMPT = [1, 9, 17, 33]
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=4, attn_layer_period=2)
    sizes |= dict(attn_layer_offset=1, use_mamba_kernels=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = JambaForCausalLM(JambaConfig(**sizes, initializer_range=0.4)).eval()
    model.set_experts_implementation("eager")
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return keras_jamba.JambaCausalLM.from_preset(folder)


def write(folder, config, model_config=None):
    """Writes generation_config.json, or removes it for None, and adds `model_config` to config.json."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    if config is not None:
        (folder / "generation_config.json").write_text(json.dumps(config))
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | (model_config or {})))


def generated_by_theirs(folder, **given):
    model = JambaForCausalLM.from_pretrained(folder).eval()
    model.set_experts_implementation("eager")
    return model.generate(torch.tensor([PROMPT]), **given)[0].tolist()


def generated_by_ours(ours, config, **given):
    """Returns the tokens of `ours` under a generation config. One model serves all, so that JAX compiles once."""
    ours.generation_config = config
    try:
        return ours.generate(PROMPT, **given).tolist()
    finally:
        ours.generation_config = None


@pytest.fixture(scope="module")
def complete(folder):
    write(folder, {})
    return generated_by_theirs(folder, max_new_tokens=24)


@full("jax", "tensorflow")
def test_rows_end_with_the_stop_tokens_of_generation_config(ours, folder, complete):
    stop = complete[9]
    for config in ({"eos_token_id": [2, stop]}, {"eos_token_id": stop, "max_new_tokens": 12}, {"eos_token_id": None}):
        write(folder, config)
        for given in ({"max_new_tokens": 16}, {}):
            assert generated_by_ours(ours, config, **given) == generated_by_theirs(folder, **given), (config, given)
    assert generated_by_ours(ours, {"eos_token_id": stop}, stop_token_ids=None, max_new_tokens=24) == complete
    # Without the file, config.json names the stop tokens. A file without stop tokens means that there are none.
    ours._config["eos_token_id"] = stop
    try:
        assert generated_by_ours(ours, None, max_new_tokens=20) == complete[: complete.index(stop, 4) + 1]
        assert generated_by_ours(ours, {}, max_new_tokens=24) == complete
    finally:
        ours._config["eos_token_id"] = 2


LENGTHS = [
    {},
    {"max_length": 8},
    {"max_length": 20},
    {"max_new_tokens": 5},
    {"max_new_tokens": 5, "max_length": 7},
    {"max_new_tokens": None, "max_length": None, "temperature": 0.3, "top_k": 2},
]


@pytest.mark.parametrize("config", LENGTHS, ids=str)
def test_lengths_match_transformers_unless_passed(ours, folder, config):
    write(folder, config)
    for given in ({}, {"max_new_tokens": 3}):
        assert generated_by_ours(ours, config, **given) == generated_by_theirs(folder, **given)
    assert len(generated_by_ours(ours, config, max_length=9)) == 9


CHOICES = [
    {"repetition_penalty": 5.0, "max_new_tokens": 12, "top_k": 1},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": [2, 7], "max_new_tokens": 10},
]


@full("jax")
@pytest.mark.parametrize("config", CHOICES, ids=str)
def test_tokens_match_transformers(ours, folder, config):
    write(folder, config)
    assert generated_by_ours(ours, config) == generated_by_theirs(folder)


SAMPLING = [
    {"do_sample": True},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": None, "temperature": 0.6},
    {"do_sample": True, "top_k": 3, "top_p": 1.0},
    {"do_sample": True, "top_k": 0, "top_p": 0.7, "repetition_penalty": 1.4},
    {"do_sample": True, "temperature": 1.3, "min_p": 0.1, "top_p": 0.95, "top_k": 20},
    {"do_sample": False, "temperature": 0.3, "top_p": 0.5, "repetition_penalty": 1.3},
]


@once
@pytest.mark.parametrize("config", SAMPLING, ids=str)
def test_probabilities_match_transformers(theirs, config):
    theirs.generation_config, before = transformers.GenerationConfig(**config), theirs.generation_config
    try:
        prepared, _ = theirs._prepare_generation_config(None)
    finally:
        theirs.generation_config = before
    theirs._prepare_special_tokens(prepared, device="cpu")
    processors = theirs._get_logits_processor(prepared, input_ids_seq_length=4, device="cpu", model_kwargs={})
    logits = np.random.default_rng(0).normal(size=(1, 64)).astype("float32") * 3
    scores = processors(torch.tensor([PROMPT]), torch.tensor(logits))
    if config["do_sample"]:
        expected = torch.softmax(scores, dim=-1)[0].numpy()
    else:
        expected = np.eye(64)[int(scores.argmax())]
    sampler, draws = sampler_of_config(config), 20000
    uniform = keras.ops.convert_to_tensor((np.arange(draws, dtype="float32") + 0.5) / draws)
    seen = keras.ops.convert_to_tensor(np.repeat(np.isin(np.arange(64), PROMPT)[None], draws, axis=0))
    tokens = sampler.choose(keras.ops.convert_to_tensor(np.repeat(logits, draws, axis=0)), uniform, seen)
    np.testing.assert_allclose(np.bincount(numpy(tokens), minlength=64) / draws, expected, atol=2e-4)


@once
@pytest.mark.parametrize(
    "config, message",
    [
        ({"no_repeat_ngram_size": 3}, "Received: no_repeat_ngram_size=3. Pass sampler="),
        ({"bad_words_ids": [[5]]}, "bad_words_ids"),
        ({"suppress_tokens": [5], "begin_suppress_tokens": [6]}, r"suppress_tokens=\[5\], begin_suppress_tokens"),
        ({"min_new_tokens": 3}, "min_new_tokens=3"),
        ({"do_sample": True, "typical_p": 0.3}, "typical_p=0.3"),
        ({"num_beams": 2, "do_sample": True}, "do_sample=True with num_beams=2"),
        ({"num_beams": 2, "repetition_penalty": 1.2}, "repetition_penalty=1.2 with num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0.*change model.generation_config"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be a number from 0 to 1.*change model.generation_config"),
        ({"num_beams": "3"}, "num_beams must be an integer.*change model.generation_config"),
        ({"max_new_tokens": 2.5}, "must be an integer. Received: max_new_tokens=2.5. Change"),
        ({"max_length": 3}, "at most max_length tokens long. Received: 4 tokens in row 0 and max_length=3"),
        ({"eos_token_id": ["2"]}, "must be an integer. Received: eos_token_id='2'. Change"),
    ],
)
def test_unsupported_options_are_refused_unless_a_sampler_is_passed(ours, config, message):
    with pytest.raises(ValueError, match=message):
        generated_by_ours(ours, config)
    if not {"max_new_tokens", "max_length", "eos_token_id"} & config.keys():
        assert len(generated_by_ours(ours, config, sampler="greedy", max_new_tokens=3)) == 7


@once
@pytest.mark.parametrize(
    "neutral",
    [
        {"no_repeat_ngram_size": 0, "typical_p": 1.0, "do_sample": False, "num_beams": 1, "min_length": 0},
        {"bad_words_ids": None, "suppress_tokens": [], "num_return_sequences": 1, "transformers_version": "4.40.1"},
        {"typical_p": 0.5, "use_cache": True, "cache_implementation": "static", "renormalize_logits": True},
    ],
    ids=str,
)
def test_options_without_effect_are_ignored(ours, neutral):
    assert generated_by_ours(ours, neutral, max_new_tokens=3) == generated_by_ours(ours, None, max_new_tokens=3)


def test_generation_config_is_saved_with_the_model(theirs, folder, complete, tmp_path):
    config = {"eos_token_id": [2, complete[9]], "max_new_tokens": 9, "note": "ü"}
    write(folder, config)
    model = keras_jamba.JambaCausalLM.from_preset(folder)
    assert model.generation_config == config
    model.save_to_preset(tmp_path / "preset")
    again = keras_jamba.JambaCausalLM.from_preset(tmp_path / "preset", load_weights=False)
    assert again.generation_config == config
    model.export_to_transformers(tmp_path / "export")
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text()) == config
    assert generated_by_theirs(tmp_path / "export") == generated_by_theirs(folder)
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="generation_config.json must hold one JSON object. Received: .*list"):
        keras_jamba.JambaCausalLM.from_preset(folder, load_weights=False)
    write(folder, {})


@once
def test_config_json_decides_without_a_generation_config_file(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    for more in ({"max_length": 9, "repetition_penalty": 5.0}, {"max_new_tokens": 2, "top_k": 3}):
        write(tmp_path, None, {"max_length": None, "repetition_penalty": None} | more)
        model = keras_jamba.JambaCausalLM.from_preset(tmp_path)
        assert model.generation_config is None and model.generate(PROMPT).tolist() == generated_by_theirs(tmp_path)


def test_an_export_keeps_the_stop_tokens(tmp_path):
    """The model config, the tokenizer or neither names the stop tokens."""
    for i, given in enumerate(({"eos_token_id": [5, 7]}, {}, {"eos_token_id": None})):
        model = tiny(**given)
        model.tokenizer = None
        if i == 1:
            model.tokenizer = Letters()
            model.tokenizer.save = lambda folder: None
            model.tokenizer.eos_token_id = 11
        model.export_to_transformers(tmp_path / str(i))
        config = JambaForCausalLM.from_pretrained(tmp_path / str(i)).generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        assert (
            tuple(i for i in ends if i is not None) == make_request(model, [1]).stop_token_ids == ((5, 7), (11,), ())[i]
        )


def test_only_a_sampler_passed_to_compile_overrides_the_file():
    model = tiny()
    model.generation_config = {"do_sample": True, "top_k": 7}
    assert make_request(model, [1]).sampler.top_k == 7
    model.compile()
    assert make_request(model, [1]).sampler.top_k == 7 and model.get_compile_config()["sampler"] == "auto"
    model.compile(sampler="greedy")
    assert (
        make_request(model, [1]).sampler.temperature == 0
        and make_request(model, [1], sampler="top_k").sampler.top_k == 5
    )
    model.generation_config = {"num_beams": 3}
    model.compile()
    assert isinstance(make_request(model, [1]).sampler, BeamSampler)
    model.generation_config = None
    assert make_request(model, [1]).sampler.temperature == 0


def test_unseeded_samples_repeat_only_after_set_random_seed(ours):
    draw = lambda: ours.generate([PROMPT], max_new_tokens=8, sampler=Sampler(temperature=3.0))[0].tolist()  # noqa: E731
    keras.utils.set_random_seed(3)
    first, second = draw(), draw()
    keras.utils.set_random_seed(3)
    assert [draw(), draw()] == [first, second] and first != second


KEYWORDS = [
    (dict(temperature=0.7), r"Received: temperature=0.7. Pass sampler=keras_jamba.Sampler\(temperature=0.7\)"),
    (dict(top_p=0.9, top_k=5), r"Pass sampler=keras_jamba.Sampler\(top_p=0.9, top_k=5\)"),
    (dict(do_sample=True), r"Pass sampler=keras_jamba.Sampler\(\) to draw tokens, or sampler='greedy'"),
    (dict(do_sample=True, min_p=0.1), r"Received: do_sample=True, min_p=0.1. Pass sampler=keras_jamba.Sampler\(min_p"),
    (dict(num_beams=4), r"Pass sampler=keras_jamba.generation.BeamSampler\(num_beams=4\)"),
    (dict(repetition_penalty=1.1, seed=1), r"Sampler\(repetition_penalty=1.1, seed=1\)"),
    (
        dict(max_tokens=5),
        "must be one of .*max_new_tokens.* Received: max_tokens=5. Instead of max_tokens pass max_new",
    ),
    (dict(stop=["x"]), "pass stop_strings"),
    (dict(nonsense=1), r"must be one of \[.*\]. Received: nonsense=1. Pass one of these"),
]


@once
@pytest.mark.parametrize("given, message", KEYWORDS, ids=str)
def test_errors_show_where_sampler_options_and_unknown_arguments_belong(given, message):
    model = tiny()
    for call in (lambda: model.generate([1], **given), lambda: model.stream([1], **given)):
        with pytest.raises(ValueError, match=message):
            call()
    if "must be one of .*max" not in message and "stop" not in message:
        with pytest.raises(ValueError, match=message):
            model.compile(**given)


@once
@pytest.mark.parametrize("sampler", [Sampler, 0.7, {"temperature": 0.7}, "temperature", BeamSampler, None, []])
def test_invalid_samplers_are_refused(sampler):
    model = tiny()
    calls = [lambda: model.compile(sampler=sampler)]
    if sampler is not None:
        calls += [lambda: model.generate([1], sampler=sampler), lambda: model.stream([1], sampler=sampler)]
    for call in calls:
        with pytest.raises(ValueError, match="sampler must be one of .*Received: sampler="):
            call()


@once
@pytest.mark.parametrize(
    "inputs, message",
    [
        (None, "Prompts must be a string, .*Received: NoneType 'None'"),
        (5, "Received: int '5'"),
        (b"text", "Received: bytes"),
        ({1, 2}, "Received: set"),
        (["text", 5], "strings alone. Received: int '5'"),
        (np.array("text", object), "Text needs a tokenizer"),
        ([[1, [2]]], "rows of ids alone. Received"),
        ([1, [2, 3]], "rows of ids alone. Received"),
        (np.zeros((1, 2, 3), int), r"\(t,\) or \(b, t\). Received: shape=\(1, 2, 3\)"),
        (np.array(3), r"Received: shape=\(\)"),
        ([None], "must be integers. Received: .*dtype=object"),
        ([True], "must be integers. Received: .*dtype=bool"),
    ],
)
def test_invalid_prompts_are_refused(inputs, message):
    model = tiny()
    model.tokenizer = None if message.startswith("Text") else model.tokenizer
    for call in (model.generate, model.stream, model.prefill):
        with pytest.raises(ValueError, match=message):
            call(inputs)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int64"])
def test_ids_of_every_integer_dtype_give_the_same_tokens(ours, dtype):
    expected = ours.generate([PROMPT], max_new_tokens=4)[0]
    for x in (np.array([PROMPT], dtype), keras.ops.convert_to_tensor(np.array([PROMPT], dtype))):
        np.testing.assert_array_equal(ours.generate(x, max_new_tokens=4)[0], expected)
        np.testing.assert_array_equal(ours.generate({"token_ids": x}, max_new_tokens=4)[0], expected)
    np.testing.assert_array_equal(ours.generate(np.array(PROMPT, dtype), max_new_tokens=4), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": "x"},
        {"eos_token_id": [1, {}]},
        {"eos_token_id": True},
        {"pad_token_id": "x"},
        {"max_length": "x"},
        {"max_new_tokens": [3]},
    ],
    ids=str,
)
def test_a_field_of_a_wrong_type_is_named_with_its_file(options):
    (name,) = options
    reader = {"e": generation_config.stop_token_ids, "p": generation_config.pad_token_id}
    with pytest.raises(ValueError, match=f"{name} in generation_config.json.*must be an integer. Received: {name}="):
        reader.get(name[0], generation_config.length_limits)(options)

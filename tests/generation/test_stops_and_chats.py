"""Special tokens, stop strings and conversations, against transformers."""

import keras
import numpy as np
import pytest
import torch
from checks import full, once
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, StoppingCriteriaList
from transformers.generation import StopStringCriteria

import keras_jamba
from keras_jamba.generation.request import make_request
from keras_jamba.tokenizers import ByteTokenizer, load_tokenizer

SPECIALS = ["<pad>", "<s>", "</s>", "<|start|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a tokenizer of bytes, four byte pairs and special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("H", "i"), ("!", "Ġ"), ("s", "t"), ("o", "p")]
    vocab = {x: i for i, x in enumerate([*SPECIALS, *alphabet, *map("".join, pairs)])}
    library = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(SPECIALS)
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.save(str(folder / "tokenizer.json"))
    config = '{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": "%s"}'
    (folder / "tokenizer_config.json").write_text(config % TEMPLATE)
    (folder / "config.json").write_text('{"model_type": "jamba"}')
    return folder


@pytest.fixture(scope="module")
def model(folder):
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(
        265, d_model=16, num_layers=2, mamba_ratio=1, moe_frequency=0, num_heads=2, eos_token_id=2, pad_token_id=0
    )
    model.tokenizer = load_tokenizer(folder)
    return model


class Scripted:
    """A sampler that returns given ids in order, for any probabilities."""

    def __init__(self, ids):
        self._ids = iter([*ids, *[2] * 40])

    def get_next_token(self, probabilities):
        return keras.ops.full((probabilities.shape[0],), next(self._ids), "int32")


END, START = 4, 3
CASES = {
    "a special token": ("q", ["Hi!", END, START, "user again"], ["<|end|>"], "Hi!"),
    "a special token behind others": ("q", ["Hi", START, "!", END, "x"], ["<|end|>"], "Hi!"),
    "text and a special token": ("q", ["Hi!", END, "x"], ["!<|end|>"], "Hi"),
    "a special token and text": ("q", ["Hi", START, "user: x"], ["<|start|>user"], "Hi"),
    "a special token and other text": ("q", ["Hi", START, "us", "x", END], ["<|start|>user", "<|end|>"], "Hiusx"),
    "a part of a special token": ("q", ["Hi", END, "x"], ["end|"], "Hi"),
    "several tokens": ("q", ["a", "st", "op", "b"], ["stop"], "a"),
    "from the middle of a token to that of another": ("q", ["a", "Hi", "st", "op"], ["isto"], "aH"),
    "never": ("q", ["Hi!", START, "a"], ["<|end|>"], "Hi!a"),
    "begun in the prompt": ("ask st", ["op", "x"], ["stop"], ""),
    "in the prompt alone": ("stop<|end|>", ["Hi", "x", END, "y"], ["stop", "<|end|>"], "Hix"),
    "a special token and the end of the prompt": ("q<|start|>", ["user", "x"], ["<|start|>us"], ""),
    "the first that is complete": ("q", ["a", "b", "c", "d"], ["bcd", "c"], "ab"),
    "the end of the text first": ("q", ["Hi", [2], "x"], ["x"], "Hi"),
    "a character of several bytes": ("q", ["né", "€", END], ["€<|end|>"], "né"),
    "a character that begins alike": ("q", ["né", "€", "x", END], ["ê<|end|>", "<|end|>"], "né€x"),
    "special tokens alone": ("q", [START, START, END], ["<|end|>"], ""),
}


@full("jax", "tensorflow")
@pytest.mark.parametrize("name", CASES)
def test_a_text_ends_before_its_stop_string_as_in_transformers(model, folder, name):
    prompt, script, stops, expected = CASES[name]
    encode = lambda x: [x] if isinstance(x, int) else x if isinstance(x, list) else model.tokenizer.encode(x)[1:]  # noqa: E731
    ids = [i for x in script for i in encode(x)]
    given = dict(max_new_tokens=24, stop_strings=stops)
    assert model.generate(prompt, sampler=Scripted(ids), strip_prompt=True, **given) == expected
    assert model.generate(prompt, sampler=Scripted(ids), **given) == model.tokenizer.decode(
        model.tokenizer.encode(prompt)
    ) + (expected)
    assert "".join(model.stream(prompt, sampler=Scripted(ids), **given)) == expected
    row = model.tokenizer.encode(prompt)
    found = model.generate(row, sampler=Scripted(ids), strip_prompt=True, **given).tolist()
    # transformers stops after the same number of tokens.
    theirs = AutoTokenizer.from_pretrained(folder)
    criteria = StoppingCriteriaList([StopStringCriteria(theirs, stops)])
    ids, count = [*ids, *[2] * 24][:24], 0
    for count in range(1, 25):
        if ids[count - 1] == 2 or bool(criteria(torch.tensor([[*row, *ids[:count]]]), None).all()):
            break
    assert found == ids[:count]


def test_text_that_cannot_begin_a_stop_string_is_streamed_at_once(model):
    ids = model.tokenizer.encode("ab<|start|>c<|end|>")[1:]
    chunks = model.stream("q", sampler=Scripted(ids), max_new_tokens=9, stop_strings=["<|start|>d", "<|end|>"])
    assert list(chunks) == ["a", "b", "c"]


@pytest.mark.parametrize("stops", ["", [""], [3], 5, [None]])
def test_invalid_stop_strings_are_refused(model, stops):
    with pytest.raises(ValueError, match="stop_strings must be a string or a list of strings .*Received: stop_strings"):
        model.generate("q", stop_strings=stops)


def test_stop_strings_of_generation_config_apply_unless_passed(model):
    ids = model.tokenizer.encode("Hi!<|end|>x")[1:]
    model.generation_config = {"stop_strings": ["<|end|>"], "eos_token_id": 2}
    try:
        assert model.generate("q", sampler=Scripted(ids), strip_prompt=True) == "Hi!"
        assert "".join(model.stream("q", sampler=Scripted(ids))) == "Hi!"
        assert model.generate("q", sampler=Scripted(ids), strip_prompt=True, stop_strings=()) == "Hi!x"
    finally:
        model.generation_config = None


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "q"}]


@full("jax")
def test_a_conversation_is_rendered_and_answered(model, folder):
    text = model.tokenizer.apply_chat_template(TALK)
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert make_request(model, TALK).prompts.row(0).tolist() == ids and ids.count(1) == 1
    given = dict(max_new_tokens=6, stop_token_ids=None)
    answer = model.generate(TALK, strip_prompt=True, **given)
    assert answer == model.generate(text, strip_prompt=True, **given)
    assert model.generate(TALK, **given) == model.generate(text, **given) == model.tokenizer.decode(ids) + answer
    assert "".join(model.stream(TALK, **given)) == answer
    several = model.generate([TALK, TALK[:1]], strip_prompt=True, **given)
    assert several == [answer, model.generate(TALK[:1], strip_prompt=True, **given)]
    state = model.prefill(TALK)
    assert model.generate(TALK, state=state, strip_prompt=True, **given) == answer


@once
@pytest.mark.parametrize(
    "messages, message",
    [
        ([{"content": "hi"}], "a role and a content. Received: .*content"),
        ([TALK[0], 5], "a role and a content. Received: '5'"),
        ([TALK, TALK[0]], "a role and a content. Received"),
        ([TALK, 5], "a role and a content. Received"),
        ([{"token_ids": [1]}], "a role and a content. Received"),
    ],
)
def test_invalid_conversations_are_refused(model, messages, message):
    with pytest.raises(ValueError, match=message):
        model.generate(messages)


@once
def test_a_conversation_without_a_template_is_refused(model):
    own, template = model.tokenizer, model.tokenizer.chat_template
    try:
        own.chat_template = None
        for tokenizer, message in (
            (None, "whose tokenizer is None"),
            (ByteTokenizer(), "a ByteTokenizer without apply_chat_template"),
            (own, "A conversation needs a template. Received: a tokenizer without chat_template.jinja"),
        ):
            model.tokenizer = tokenizer
            for call in (model.generate, model.stream, model.prefill):
                with pytest.raises(ValueError, match=message):
                    call(TALK)
        own.chat_template = "{{ raise_exception('no users') }}"
        with pytest.raises(ValueError, match="cannot render this conversation. Received: no users"):
            model.generate(TALK)
    finally:
        model.tokenizer, own.chat_template = own, template


def test_streaming_a_batch_of_conversations_is_refused(model):
    with pytest.raises(ValueError, match="A stream continues one prompt"):
        model.stream([TALK, TALK])
    np.testing.assert_array_equal(
        make_request(model, [TALK, TALK]).prompts.token_ids[0], make_request(model, TALK).prompts.token_ids[0]
    )

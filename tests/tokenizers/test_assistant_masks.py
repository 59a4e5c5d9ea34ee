"""Masks of the assistant's tokens, compared with transformers and with the places of the answers."""

import json

import pytest
import transformers
from checks import once
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from keras_jamba.tokenizers import load_tokenizer

# Independent of the backend.
pytestmark = once
SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TALK = [
    {"role": "system", "content": "Be brief. Ça va? 你好"},
    {"role": "user", "content": "Where is the cat?  🐈‍⬛"},
    {"role": "assistant", "content": "  On the mat: e\u0301té 🐈‍⬛!\n"},
    {"role": "user", "content": "And the dog?<|im_end|>"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é"}}}]},
    {"role": "tool", "content": '{"place": "log 你"}'},
    {"role": "assistant", "content": "On the log."},
]
TALKS = [TALK, TALK[:3], TALK[1:3], TALK[:2], TALK[:2] + TALK[6:]]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": "é"}}}]
IM = "<|im_start|>{{ m.role }}\n"
TEMPLATES = {
    "the end token inside": "{% for m in messages %}" + IM + "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "whitespace control": "{%- for m in messages %}\n  {%- if m.role == 'assistant' -%}\n"
    "   A: {%- generation -%}\n  {{- m.content | trim }} \n  {%- endgeneration %}\n  {% else %}\n"
    "   {{ m.role }}: {{ m.content }}\n  {%- endif -%}\n{% endfor %}",
    "own lines": "{% for m in messages %}\n{% if m.role == 'assistant' %}\n    {% generation %}\n"
    "    {{ m.content }}\n    {% endgeneration %}\n{% else %}\n{{ m.content }}\n{% endif %}\n{% endfor %}",
    "tools": "{{ tools | tojson }}{% for m in messages %}" + IM + "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "every word": "{% for m in messages %}{{ m.role }}{% for w in m.content.split(' ') %}{% generation %}{{ w }}"
    "{% endgeneration %} {% endfor %}{% endfor %}",
    "parts of words": "{% for m in messages %}{{ m.content[:3] }}{% generation %}{{ m.content[3:9] }}"
    "{% endgeneration %}{{ m.content[9:] }}{% endfor %}",
    "nested tags": "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}"
    "{% generation %}in{% endgeneration %}out{% endgeneration %}|{% endfor %}",
    "nothing inside": "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}e{% endfor %}",
}


@pytest.fixture(scope="module", params=["bytes", "words", "metaspace"])
def both(tmp_path_factory, request):
    """Returns our and transformers' tokenizer of a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    library = Tokenizer(models.BPE(unk_token=None))
    library.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if request.param == "metaspace":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        library.pre_tokenizer, library.decoder = None, decoders.Metaspace()
        alphabet = []
    merges = {"bytes": 0, "words": 200, "metaspace": 400}[request.param]
    texts = [m["content"] for m in TALK] + ["in out assistant system user tool"] * 3
    given = dict(initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False)
    library.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=len(alphabet) + 5 + merges, **given))
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder), transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), **config
    )


MASK = dict(return_dict=True, return_assistant_tokens_mask=True)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("call", [{}, {"add_generation_prompt": True}, {"tools": TOOLS}], ids=str)
def test_the_mask_equals_that_of_transformers(both, name, call):
    ours, theirs = both
    ours.chat_template = theirs.chat_template = TEMPLATES[name]
    call = {"add_generation_prompt": False} | MASK | call
    for messages in (*TALKS, TALKS):
        expected = theirs.apply_chat_template(messages, **call)
        expected = {key: expected[key] for key in ("input_ids", "attention_mask", "assistant_masks")}
        assert ours.apply_chat_template(messages, **call) == expected
        assert ours.apply_chat_template(messages, tokenize=True, **call) == expected
        del expected["assistant_masks"]
        assert ours.apply_chat_template(messages, **call | {"return_assistant_tokens_mask": False}) == expected
    assert sum(ours.apply_chat_template(TALK, **call)["assistant_masks"]) > 0 or name == "nothing inside"


def test_a_mask_is_truncated_with_its_ids_as_in_transformers(both):
    ours, theirs = both
    ours.chat_template = theirs.chat_template = TEMPLATES["the end token inside"]
    found = ours.apply_chat_template(TALK, add_generation_prompt=False, **MASK)
    for side, cut in (("right", lambda x, n: x[:n]), ("left", lambda x, n: x[-n:])):
        theirs.truncation_side = side
        for n in range(1, len(found["input_ids"]), 7):
            expected = theirs.apply_chat_template(TALK, truncation=True, max_length=n, **MASK)
            assert cut(found["input_ids"], n) == expected["input_ids"]
            assert cut(found["assistant_masks"], n) == expected["assistant_masks"]
    theirs.truncation_side = "right"


# Transformers assumes that an answer begins where the text written before it ends. Here it does not.
PLACED = {
    "a macro": "{% macro turn(m) %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}|{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "a variable": "{% for m in messages %}{% set turn %}{{ m.role }}: {% generation %}{{ m.content }}"
    "{% endgeneration %}|{% endset %}{{ turn }}{% endfor %}",
    "a sum": "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{{ m.role ~ ': ' ~ say(m) ~ '|' }}{% endfor %}",
    "a recursive loop": "{% for m in messages recursive %}{{ m.role }}: {% if m.parts %}{{ loop(m.parts) }}{% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %}|{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", PLACED)
def test_answers_in_functions_of_a_template_have_their_exact_places(both, name):
    ours, _ = both
    same = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
    expected = ours.apply_chat_template(TALK, chat_template=same, **MASK)
    assert ours.apply_chat_template(TALK, chat_template=PLACED[name], **MASK) == expected
    assert type(ours.apply_chat_template(TALK, chat_template=PLACED[name])) is str


def test_the_marked_tokens_are_the_text_of_the_answers(both):
    ours, _ = both
    found = ours.apply_chat_template(TALK, chat_template=TEMPLATES["the end token inside"], **MASK)
    answers = [m["content"] for m in TALK if m["role"] == "assistant"]
    expected = "".join(ours.decode(ours.encode(text, add_special_tokens=False)) + "<|im_end|>" for text in answers)
    ids = [token for token, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert ours.decode_with_special_tokens(ids).replace(" ", "") == expected.replace(" ", "")


TAGGED = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
NO_TAG = "needs a chat template that marks the answers. Received: a template without {% generation %}, in"
CHANGED = "must write its answers as they are.*Received: one that changes or drops"


@pytest.mark.parametrize(
    "template, call, message",
    [
        ("{{ messages }}", MASK, f"{NO_TAG} the argument chat_template. Write"),
        ("{# {% generation %} #}{{ messages }}", MASK, NO_TAG),
        (f"{{% filter upper %}}{TAGGED}{{% endfilter %}}", MASK, CHANGED),
        (f"{{% set x %}}{TAGGED}{{% endset %}}{{{{ x[1:] }}}}", MASK, CHANGED),
        (f"{{% set x %}}{TAGGED}{{% endset %}}", MASK, CHANGED),
        (TAGGED, {"return_assistant_tokens_mask": True}, "is an item of a dict. Received: .* Pass return_dict=True"),
        (TAGGED, MASK | {"return_dict": "yes"}, "return_dict must be True or False. Received: return_dict='yes'"),
        (
            TAGGED,
            MASK | {"continue_final_message": True, "add_generation_prompt": False},
            "needs complete messages. Received: .*continue_final_message=True",
        ),
        (TAGGED, MASK | {"truncation": True}, "Received: truncation=True. Cut the ids"),
    ],
)
def test_a_mask_that_cannot_be_exact_is_refused(both, template, call, message):
    ours, _ = both
    with pytest.raises(ValueError, match=message):
        ours.apply_chat_template(TALK, chat_template=template, **call)


def test_the_places_of_answers_are_bounded(both):
    ours, _ = both
    template = "{% set ns = namespace() %}{% set x %}{% generation %}{% endgeneration %}{% endset %}{% set ns.x = x %}"
    template += "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
    with pytest.raises(ValueError, match="little time and memory. Received: a template whose values"):
        ours.apply_chat_template(TALK, chat_template=template, **MASK)

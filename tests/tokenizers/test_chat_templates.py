"""Tokenizers and chat templates of folders, compared with transformers."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import transformers
from checks import once
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from keras_jamba.tokenizers import load_tokenizer, save_tokenizer

# Independent of the backend.
pytestmark = once
SPECIALS = ["<pad>", "<s>", "</s>", "<|end|>"]
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def write(folder, config=None, model_type="jamba", post_processor=None, special=None):
    """Writes a byte tokenizer to `folder` and returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    library.add_special_tokens(SPECIALS if special is None else special)
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.normalizer = normalizers.NFC()
    if post_processor:
        library.post_processor = processors.TemplateProcessing(
            single=post_processor, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | (config or {})))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def both(folder):
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


ADDITIONS = [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}]


@pytest.mark.parametrize("model_type", ["jamba", "mamba", None])
@pytest.mark.parametrize("name", [None, "LlamaTokenizer", "PreTrainedTokenizerFast", "GPTNeoXTokenizerFast"])
def test_bos_and_eos_are_added_as_transformers_adds_them(tmp_path, model_type, name):
    for i, post_processor in enumerate([None, "<s> $A", "<s> $A </s>"]):
        for j, config in enumerate(ADDITIONS):
            config = config | ({} if name is None else {"tokenizer_class": name})
            ours, theirs = both(write(tmp_path / f"{i}{j}", config, model_type, post_processor))
            for text in ("a naïve text", "", "x<|end|> y</s>"):
                assert ours.encode(text) == theirs(text)["input_ids"], (post_processor, config, text)
                assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
            # A saved tokenizer, without the config.json of transformers, encodes alike.
            (tmp_path / f"{i}{j}" / "again").mkdir()
            save_tokenizer(ours, tmp_path / f"{i}{j}" / "again")
            assert load_tokenizer(tmp_path / f"{i}{j}" / "again").encode("a") == ours.encode("a")


MAPS = [
    ({}, {"eos_token": "<|end|>"}),
    ({}, {"eos_token": {"content": "<|end|>", "lstrip": False, "rstrip": True, "normalized": False}}),
    ({"added_tokens_decoder": {}}, {"eos_token": "<|end|>"}),
    ({"additional_special_tokens": ["!"]}, None),
    ({"extra_special_tokens": {"image_token": "!"}}, None),
    ({"tool_token": "!"}, None),
    ({"added_tokens_decoder": {"3": {"content": "<|end|>", "special": False}}}, None),
    ({"split_special_tokens": True}, None),
    ({"bos_token": None}, None),
]


@pytest.mark.parametrize("config, legacy", MAPS, ids=str)
def test_special_tokens_equal_those_of_transformers(tmp_path, config, legacy):
    # tokenizer.json marks only two of the special tokens.
    folder = write(tmp_path, config, special=["<pad>", "<s>"])
    if legacy is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(legacy))
    ours, theirs = both(folder)
    ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    for kind in ("bos", "eos", "pad"):
        assert getattr(ours, f"{kind}_token") == getattr(theirs, f"{kind}_token")
        assert getattr(ours, f"{kind}_token_id") == getattr(theirs, f"{kind}_token_id")
    text = "a<|end|>  b!</s> c"
    assert ours.encode(text) == theirs(text)["input_ids"]
    for skip, decode in ((True, ours.decode), (False, ours.decode_with_special_tokens)):
        assert decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=skip)


def test_spaces_are_cleaned_up_if_the_config_requests_it(tmp_path):
    folder = write(tmp_path, {"clean_up_tokenization_spaces": True})
    library = Tokenizer(models.WordLevel({"it": 0, "'s": 1, ".": 2, "<s>": 3, "</s>": 4, "<pad>": 5}, "it"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(folder / "tokenizer.json"))
    ours, theirs = both(folder)
    assert ours.decode([0, 1, 2]) == theirs.decode([0, 1, 2]) == "it's."


TALK = [{"role": "user", "content": "héllo <b>"}, {"role": "assistant", "content": "  Hi! "}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": "é"}}}]
LOOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATES = {
    "plain": LOOP,
    "specials": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}{{ unk_token }}|",
    "prompt": LOOP + "{% if add_generation_prompt %}assistant:{% endif %}",
    "strftime_now": "{{ strftime_now('%Y') }}{{ strftime_now is defined }}",
    "break": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}",
    "tojson with options": "{{ messages | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}"
    "{{ messages | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}\n  {{ m.content }}\n{% endgeneration %}\n{% endfor %}",
    "tools": "{{ tools is none }}{{ documents is none }}{{ tools }}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}",
    "documents": "{% for d in documents or [] %}{{ d.title }}{{ d.text }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, self=3) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ ns.self }}",
    "dict": "{{ dict(a=1, b='é') }}{{ dict.fromkeys(['x'], 2) }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "blocks": "{% for m in messages %}\n"
    "    {%- if m.content is string %}\n    {{- m.content | trim }}\n    {% endif %}\n"
    "{% endfor %}",
    "missing": "{% for m in messages %}{{ 'tool_calls' in m }}{{ m.name is defined }}{{ m.nothing }}{% endfor %}",
    "variable": "{{ enable_thinking is defined }}{{ enable_thinking }}",
    "types": "{{ messages[0].extra }}{{ messages[0].n + 1 }}{{ messages[0].o }}",
}
CALLS = {
    "no more": {},
    "a prompt": dict(add_generation_prompt=True),
    "tools": dict(tools=TOOLS),
    "documents": dict(documents=[{"title": "T", "text": "é"}]),
    "a variable": dict(enable_thinking=False),
    "to go on": dict(continue_final_message=True),
}


@dataclasses.dataclass
class Message:
    role: str
    content: str
    tool_calls: list = None


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_transformers_renders_them(tmp_path, name):
    ours, theirs = both(write(tmp_path, post_processor="<s> $A"))
    ours.chat_template = theirs.chat_template = TEMPLATES[name]
    extra = {"reasoning": "because", "name": None, "n": np.int64(2), "extra": np.bool_(False), "o": object()}
    for messages in (TALK, [TALK[0] | extra], [TALK, TALK[:1]], [Message("user", "x<s>")]):
        for call in CALLS.values():
            call = dict(add_generation_prompt=False) | call
            try:
                expected = theirs.apply_chat_template(messages, tokenize=False, **call)
                ids = theirs.apply_chat_template(messages, **call)["input_ids"]
            except Exception:
                with pytest.raises(ValueError, match="Received"):
                    ours.apply_chat_template(messages, **call)
                continue
            assert ours.apply_chat_template(messages, **call) == expected
            assert ours.apply_chat_template(messages, tokenize=True, **call) == ids


REFUSED = [
    "{{ raise_exception('roles must alternate') }}",
    "{{ messages[0].content + 1 }}",
    "{{ nothing.at.all }}",
    "{% if %}",
    "{{ messages.__class__.__mro__ }}{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{% set ns = namespace(_x=1) %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ messages | tojson(nothing=1) }}",
    "{{ strftime_now(3) }}",
    "{% generation %}",
]


@pytest.mark.parametrize("template", REFUSED)
def test_templates_that_fail_in_transformers_are_refused_with_the_reason(tmp_path, template):
    ours, theirs = both(write(tmp_path))
    ours.chat_template = theirs.chat_template = template
    with pytest.raises(Exception):  # noqa: B017
        theirs.apply_chat_template(TALK, tokenize=False)
    with pytest.raises(ValueError, match="chat template .*Received"):
        ours.apply_chat_template(TALK)


def test_a_continued_message_has_the_trailing_space_of_transformers(tmp_path):
    ours, theirs = both(write(tmp_path))
    call = dict(add_generation_prompt=False, continue_final_message=True)
    messages = [TALK[0], TALK[1] | {"reasoning": "so it is "}]
    for template in (LOOP, "{% for m in messages %}{{ m.content | trim }}</s>{% endfor %}"):
        ours.chat_template = theirs.chat_template = template
        assert ours.apply_chat_template(messages, **call) == theirs.apply_chat_template(
            messages, tokenize=False, **call
        )
    ours.chat_template = theirs.chat_template = "{% for m in messages %}{{ m.thinking }}{{ m.content }}{% endfor %}"
    call["continue_final_message"] = "reasoning"
    assert ours.apply_chat_template(messages, **call) == theirs.apply_chat_template(messages, tokenize=False, **call)
    parts = [{"role": "user", "content": [{"type": "text", "text": "ab"}, {"type": "image"}]}]
    ours.chat_template = theirs.chat_template = "{% for p in messages[0].content %}{{ p.text }}{% endfor %}</s>"
    call["continue_final_message"] = True
    assert ours.apply_chat_template(parts, **call) == theirs.apply_chat_template(parts, tokenize=False, **call) == "ab"


NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]


@pytest.mark.parametrize("files", [False, True])
def test_the_named_template_or_the_one_for_tools_is_rendered(tmp_path, files):
    folder = write(tmp_path / "in", {} if files else {"chat_template": NAMED})
    if files:
        (folder / "additional_chat_templates").mkdir()
        for template in NAMED:
            name = template["name"]
            path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (folder / path).write_text(template["template"])
    ours, theirs = both(folder)
    (tmp_path / "out").mkdir()
    save_tokenizer(ours, tmp_path / "out")
    loaded, theirs_loaded = both(tmp_path / "out")
    for call in ({}, {"tools": TOOLS}, {"chat_template": "rag"}, {"chat_template": "{{ 1 + 1 }}"}):
        expected = theirs.apply_chat_template(TALK, tokenize=False, **call)
        assert ours.apply_chat_template(TALK, **call) == loaded.apply_chat_template(TALK, **call) == expected
        assert theirs_loaded.apply_chat_template(TALK, tokenize=False, **call) == expected
    ours.chat_template = {"rag": "R"}
    with pytest.raises(ValueError, match="One of several chat templates must be chosen. Received: .*rag"):
        ours.apply_chat_template(TALK)


def nested(depth):
    """Returns a list in a list, `depth` times."""
    found = []
    for _ in range(depth):
        found = [found]
    return found


ENDLESS = {"role": "user"}
ENDLESS["content"] = [ENDLESS]
GO_ON = dict(continue_final_message=True, add_generation_prompt=False)
DEEP = "values that are nested a few hundred times at most. Received: "
NO_TEXT = "needs a last message with text in 'content'.*Received: "


@pytest.mark.parametrize(
    "messages, call, message",
    [
        ([], {}, "at least one. Received: list"),
        ("hi", {}, "must be a list of messages"),
        (["hi"], {}, "A message must be a dict with a role. Received: str 'hi'"),
        (TALK, dict(tools=[max]), "tools must be a list of dicts. Received: <built-in function max>"),
        (TALK, dict(documents=["text"]), "documents must be a list of dicts. Received: 'text'"),
        (TALK, dict(return_tensors="pt"), "Received: return_tensors='pt'"),
        (TALK, dict(continue_final_message=True), "Pass add_generation_prompt=False"),
        (TALK, dict(tools=5), "tools must be a list of dicts. Received: 5"),
        (TALK, dict(tools={}), "tools must be a list of dicts. Received: {}"),
        (TALK, dict(documents=iter([{}])), "documents must be a list of dicts. Received: <list_iterato"),
        (TALK, dict(tools=[nested(5000)]), r"tools must be a list of dicts. Received: \[\["),
        (TALK, dict(tools=[{"function": nested(1500)}]), f"{DEEP}variables"),
        (TALK, dict(thing=nested(1500)), f"{DEEP}variables"),
        (TALK, dict(return_dict=nested(5000)), r"Received: return_dict=\[\["),
        ([TALK[0] | {"content": nested(1500)}], {}, f"{DEEP}messages"),
        ([{"role": "tool", "content": {"a": nested(1500)}}], {}, f"{DEEP}messages"),
        (nested(5000), {}, f"{DEEP}messages"),
        ([ENDLESS], {}, f"{DEEP}messages"),
        ([TALK[0] | {"content": [5]}], GO_ON, NO_TEXT),
        ([TALK[0] | {"content": ["text"]}], GO_ON, NO_TEXT),
        ([TALK[0] | {"content": [{"text": 5}]}], GO_ON, NO_TEXT),
    ],
    ids=lambda x: type(x).__name__,
)
def test_invalid_conversations_are_refused(tmp_path, messages, call, message):
    tokenizer = load_tokenizer(write(tmp_path, {"chat_template": LOOP}))
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(messages, **call)


@pytest.mark.parametrize("template", [5, [], {"default": 5}, {"default": None}, {"default": "D", 7: "x"}], ids=str)
def test_a_wrong_template_of_a_tokenizer_is_refused(tmp_path, template):
    tokenizer = load_tokenizer(write(tmp_path))
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="must be a text, a dict of named texts, or None. Received: .*Set one"):
        tokenizer.apply_chat_template(TALK)


@pytest.mark.parametrize("available", [LOOP, {"default": LOOP, "rag": LOOP}, None], ids=["one", "two", "none"])
@pytest.mark.parametrize("template", [5, ["a"], {}, {"default": LOOP}, b"a"], ids=str)
def test_a_wrong_argument_chat_template_is_refused(tmp_path, available, template):
    tokenizer = load_tokenizer(write(tmp_path))
    tokenizer.chat_template = available
    with pytest.raises(ValueError, match="must be the name or the text of a template. Received: .*Pass a string"):
        tokenizer.apply_chat_template(TALK, chat_template=template)


@pytest.mark.parametrize("template", [5, [{"template": "x"}], {"default": 3}])
def test_an_invalid_template_in_the_config_is_refused(tmp_path, template):
    with pytest.raises(ValueError, match="chat_template="):
        load_tokenizer(write(tmp_path, {"chat_template": template}))

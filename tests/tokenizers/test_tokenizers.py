"""Tokenizers: ids, texts, conversations, files."""

import json

import numpy as np
import pytest
from checks import once
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from keras_jamba.tokenizers import ByteTokenizer, JambaTokenizer, load_tokenizer, save_tokenizer

# Independent of the backend.
pytestmark = once
BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no bad roles') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with a byte tokenizer that has AI21's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(
        models.BPE(vocab={PAD: 0, BOS: 1, EOS: 2} | {c: i + 3 for i, c in enumerate(alphabet)}, merges=[])
    )
    library.add_special_tokens([PAD, BOS, EOS])
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": {"content": EOS}, "pad_token": PAD, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_text_gets_one_bos_token_and_is_decoded_unchanged(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    plain = tokenizer.encode("naïve text")
    assert 1 not in plain and tokenizer.decode(plain) == "naïve text"
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 2)]
    )
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("naïve text") == tokenizer.encode(BOS + "naïve text") == [1, *plain, 2]
    assert tokenizer.encode("naïve text", add_special_tokens=False) == plain
    assert tokenizer.encode(BOS + "naïve text", add_special_tokens=False) == [1, *plain]
    assert tokenizer.decode([1, *plain, 2]) == "naïve text"
    assert tokenizer.decode_with_special_tokens([1, *plain, 2]) == f"{BOS}naïve text{EOS}"


def test_a_batch_is_padded_on_the_left(folder):
    tokenizer = load_tokenizer(folder)
    batch = tokenizer(["a", "abc"])
    np.testing.assert_array_equal(batch["padding_mask"], [[False, False, True], [True] * 3])
    np.testing.assert_array_equal(batch["token_ids"], [[0, 0, *tokenizer.encode("a")], tokenizer.encode("abc")])


@pytest.mark.parametrize("make", [load_tokenizer, lambda folder: ByteTokenizer()])
def test_one_text_is_one_row_and_other_types_are_refused(folder, make):
    tokenizer = make(folder)
    np.testing.assert_array_equal(tokenizer("text")["token_ids"], [tokenizer.encode("text")])
    assert tokenizer("text")["padding_mask"].all() and tokenizer(np.array(["text", "x"]))["token_ids"].shape[0] == 2
    deep = []
    for _ in range(5000):
        deep = [deep]
    for wrong in (None, 5, [], [[1, 2]], np.array("text"), {"a": 1}, [["a"], ["b", "c"]], deep):
        with pytest.raises(ValueError, match="takes a string or a list of strings. Received"):
            tokenizer(wrong)
    for wrong in (None, 5, b"text", ["text"], deep):
        with pytest.raises(ValueError, match="encode takes a string. Received"):
            tokenizer.encode(wrong)
    with pytest.raises(ValueError, match="encode takes a string. Received: int '5'"):
        tokenizer(["text", 5])
    assert tokenizer.decode(np.array(tokenizer.encode("text"))) == "text"
    assert tokenizer.decode(np.uint8(70)) == tokenizer.decode([70])
    for wrong in ("text", None, [1.5], [[70, 71]], ["a"], deep):
        with pytest.raises(ValueError, match="decode takes a row of token ids"):
            tokenizer.decode(wrong)


@pytest.mark.parametrize("make", [load_tokenizer, lambda folder: ByteTokenizer()])
def test_half_of_a_character_is_refused_and_named(folder, make):
    tokenizer = make(folder)
    for text in ("ab\ud800", np.str_("ab\ud800"), "ab\udfff\ud800"):
        with pytest.raises(
            ValueError, match=r"string that UTF-8 can express. Received: '\\ud.*' at place 2, .*Replace"
        ):
            tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode("ab\ud800".encode("utf-8", "replace").decode())) == "ab?"
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ValueError, match="string that UTF-8 can express"):
        tokenizer.apply_chat_template([{"role": "user", "content": "\ud800"}], tokenize=True)


@pytest.mark.parametrize("make", [load_tokenizer, lambda folder: ByteTokenizer()])
def test_ids_outside_the_vocabulary_have_no_text(folder, make):
    tokenizer = make(folder)
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([-100, ids[0], 2**70, 9999, *ids[1:]]) == "ab"
    assert tokenizer.decode_with_special_tokens([-100, *ids[-2:], 2**32]) == "ab"


def test_a_conversation_follows_the_template_and_gets_one_bos_token(folder):
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages)
    assert text == f"{BOS}<user>hi<assistant>" and tokenizer.encode(text).count(1) == 1
    assert tokenizer.apply_chat_template(messages, tokenize=True) == tokenizer.encode(text)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=False).endswith(
        "hi"
    )
    with pytest.raises(ValueError, match="no bad roles"):
        tokenizer.apply_chat_template([{"role": "bad", "content": ""}])


def test_a_template_cannot_access_python_internals(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe|undefined"):
        tokenizer.apply_chat_template([{"role": "user", "content": ""}])


def test_tokenizers_are_saved_and_loaded(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = load_tokenizer(folder)
    (tmp_path / "out").mkdir()
    save_tokenizer(tokenizer, tmp_path / "out")
    loaded = load_tokenizer(tmp_path / "out")
    assert loaded.encode("text") == tokenizer.encode("text")
    assert loaded.apply_chat_template([{"role": "user", "content": "x"}]) == "x"
    (tmp_path / "bytes").mkdir()
    save_tokenizer(ByteTokenizer(add_bos=False), tmp_path / "bytes")
    assert load_tokenizer(tmp_path / "bytes").encode("é") == [0xC3, 0xA9]
    assert load_tokenizer(tmp_path) is not None and load_tokenizer(tmp_path / "nowhere") is None


def test_bytes_are_decoded_and_incomplete_characters_do_not_fail():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("é!")) == "é!" and tokenizer.decode([0xC3]) == "\ufffd"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 1}'])
def test_a_damaged_file_is_refused(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="must be what the library tokenizers wrote.*tokenizer.json"):
        JambaTokenizer(folder)


def test_a_special_token_outside_the_vocabulary_is_refused(folder):
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(ValueError, match="bos_token='<s>'"):
        JambaTokenizer(folder)


LEGACY = "special_tokens_map.json"


@pytest.mark.parametrize("token", [5, ["<s>"], {"content": 5}, {}, {"content": BOS, "lstrip": "no"}])
def test_the_file_of_a_wrong_special_token_is_named(folder, token):
    (folder / LEGACY).write_text(json.dumps({"bos_token": token}))
    with pytest.raises(ValueError, match=f"Received: bos_token=.* in {LEGACY}"):
        load_tokenizer(folder)
    config = folder / "tokenizer_config.json"
    # With token ids, tokenizer_config.json takes precedence.
    config.write_text(json.dumps({"bos_token": BOS, "added_tokens_decoder": {}}))
    assert load_tokenizer(folder).bos_token == BOS
    config.write_text(json.dumps({"bos_token": token, "added_tokens_decoder": {}}))
    with pytest.raises(ValueError, match="Received: bos_token=.* in tokenizer_config.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["extra_special_tokens", "additional_special_tokens"])
def test_the_field_of_a_wrong_additional_token_is_named(folder, name):
    (folder / "tokenizer_config.json").write_text(json.dumps({name: [BOS, 7]}))
    with pytest.raises(ValueError, match=f"Received: {name}=7 in tokenizer_config.json"):
        load_tokenizer(folder)


def test_the_file_of_a_token_outside_the_vocabulary_is_named(folder):
    (folder / LEGACY).write_text('{"bos_token": "<s>"}')
    with pytest.raises(ValueError, match=f"special tokens of {LEGACY} must be in tokenizer.json"):
        load_tokenizer(folder)


def test_a_conversation_without_a_template_is_refused(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="A conversation needs a template"):
        tokenizer.apply_chat_template([])


@pytest.mark.parametrize(
    "config",
    [
        '{"bos_token": 5}',
        '{"tokenizer_class": 3}',
        '{"added_tokens_decoder": {"0": {"content": 5}}}',
        '{"added_tokens_decoder": {"x": {"content": "<s>"}}}',
        '{"added_tokens_decoder": ["<s>"]}',
        '{"added_tokens_decoder": {"0": "<s>"}}',
        '{"added_tokens_decoder": {"' + "9" * 5000 + '": {"content": "<s>"}}}',
        '{"extra_special_tokens": 7}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_fields_of_a_wrong_type_are_refused(folder, config):
    (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match="Received: "):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"add_bos": 1}', '{"add_bos": true, "more": 1}', "[" * 100_000])
def test_a_damaged_byte_tokenizer_is_refused(tmp_path, text):
    (tmp_path / "byte_tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="byte_tokenizer.json must be a JSON object.*Received: "):
        load_tokenizer(tmp_path)

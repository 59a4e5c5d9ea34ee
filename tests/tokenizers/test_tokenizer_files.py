"""Files of saved tokenizers: they replace what an earlier save or download left in the folder."""

import json
from pathlib import Path

import pytest
from checks import once
from test_chat_templates import both, write

from keras_jamba.tokenizers import ByteTokenizer, JambaTokenizer, load_tokenizer, save_tokenizer

# Independent of the backend.
pytestmark = once
CHOICES = [None, "one", {"default": "D", "rag": "R"}, {"rag": "S", "tool_use": "T"}]
LEGACY = "special_tokens_map.json"


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("old", CHOICES, ids=str)
@pytest.mark.parametrize("new", CHOICES, ids=str)
def test_a_save_replaces_the_templates_of_an_earlier_save(tmp_path, old, new):
    tokenizer = load_tokenizer(write(tmp_path))
    for tokenizer.chat_template in (old, new):
        tokenizer.save(tmp_path)
    ours, theirs = both(tmp_path)
    assert ours.chat_template == theirs.chat_template == new
    assert (tmp_path / "additional_chat_templates").exists() == isinstance(new, dict)


def test_a_save_replaces_templates_of_other_names_and_links_to_one_text(tmp_path):
    folder = write(tmp_path / "in") / "additional_chat_templates"
    folder.mkdir()
    (tmp_path / "text").write_text("old")
    for link in (folder / "default.jinja", folder / "x.jinja", folder.parent / "chat_template.jinja"):
        link.symlink_to(tmp_path / "text")
    tokenizer = load_tokenizer(folder.parent)
    assert tokenizer.chat_template == {"default": "old", "x": "old"}
    tokenizer.chat_template = "new"
    tokenizer.save(folder.parent)
    assert load_tokenizer(folder.parent).chat_template == "new"


def test_a_changed_token_is_not_overridden_by_an_older_file(tmp_path):
    (write(tmp_path) / LEGACY).write_text(json.dumps({"pad_token": "<|end|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "<|end|>"
    tokenizer.pad_token = "<pad>"
    tokenizer.save(tmp_path)
    ours, theirs = both(tmp_path)
    assert ours.pad_token == theirs.pad_token == "<pad>" and ours.pad_token_id == theirs.pad_token_id == 0


def test_a_tokenizer_replaces_a_byte_tokenizer(tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path / "out")
    save_tokenizer(load_tokenizer(write(tmp_path / "in")), tmp_path / "out")
    assert type(load_tokenizer(tmp_path / "out")) is JambaTokenizer


def test_files_that_loading_does_not_read_stay(tmp_path):
    others = ["notes.txt", "added_tokens.json", "additional_chat_templates/notes.md", "deeper/chat_template.jinja"]
    tokenizer = load_tokenizer(write(tmp_path))
    tokenizer.chat_template = {"default": "D", "rag": "R"}
    tokenizer.save(tmp_path)
    for file in others:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("mine")
    tokenizer.chat_template = None
    tokenizer.save(tmp_path)
    assert content(tmp_path).keys() == {*others, "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert all((tmp_path / file).read_text() == "mine" for file in others)


@pytest.mark.parametrize(
    "template, message",
    [
        ("\ud800", r"texts of a saved tokenizer must be UTF-8. Received: .*\\ud800"),
        ({"default": 5}, "chat_template of a tokenizer must be a text.*Received: {'default': 5}"),
        (["text"], r"chat_template of a tokenizer must be a text.*Received: \['text'\]"),
        ({"../rag": "R"}, "must be the name of a file. Received: '../rag'"),
        ({"a/b": "R"}, "must be the name of a file. Received: 'a/b'"),
        ({"a\0": "R"}, "must be the name of a file. Received: 'a"),
    ],
)
def test_a_save_that_is_refused_changes_no_file(tmp_path, template, message):
    (write(tmp_path) / LEGACY).write_text("{}")
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = {"default": "D", "rag": "R"}
    tokenizer.save(tmp_path)
    (tmp_path / LEGACY).write_text("{}")
    before = content(tmp_path)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        tokenizer.save(tmp_path)
    assert content(tmp_path) == before


def test_older_files_are_removed_after_all_new_ones_are_written(tmp_path, monkeypatch):
    (write(tmp_path) / LEGACY).write_text(json.dumps({"pad_token": "<|end|>"}))
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template, tokenizer.pad_token = {"default": "D", "rag": "R"}, "<pad>"

    def killed(file, missing_ok=False):
        if file.name == LEGACY:
            raise KeyboardInterrupt
        unlink(file, missing_ok)

    unlink = Path.unlink
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "<pad>"
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template and loaded.pad_token == "<|end|>"
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<pad>"

"""Tokenizers in folders."""

import json
import tempfile
from pathlib import Path

from keras_jamba import _files
from keras_jamba.tokenizers.byte_tokenizer import ByteTokenizer
from keras_jamba.tokenizers.jamba_tokenizer import TOKENIZER, JambaTokenizer

# Beside a preset whose tokens are bytes: there is no file of another library that says so.
BYTES = "byte_tokenizer.json"


def load_tokenizer(folder):
    """The tokenizer in a folder, or None."""
    folder = Path(folder)
    if (folder / BYTES).is_file():
        return ByteTokenizer(**json.loads((folder / BYTES).read_text("utf-8")))
    return JambaTokenizer(folder) if (folder / TOKENIZER).is_file() else None


def save_tokenizer(tokenizer, folder):
    """Writes what `load_tokenizer` reads; each file appears whole, and none where not all can be written.

    Raises:
        ValueError: for a tokenizer of another class without `save(folder)`.
    """
    if isinstance(tokenizer, ByteTokenizer):
        with _files.atomic_file(Path(folder) / BYTES) as staged:
            _files.write_json(staged, {"add_bos": tokenizer.add_bos}, indent=None)
    elif hasattr(tokenizer, "save"):
        tokenizer.save(folder)
    else:
        raise ValueError(
            "A tokenizer is saved by its save(folder). Received: "
            f"{type(tokenizer).__name__} without one. Set the model's tokenizer to None, or write one."
        )


def check_comes_back(tokenizer):
    """Refuses a tokenizer that `load_tokenizer` would not return from what `save_tokenizer` writes; None is fine.

    Raises:
        ValueError: for a tokenizer of another class that is not saved, or whose files another class reads.
    """
    if tokenizer is None or type(tokenizer) in (ByteTokenizer, JambaTokenizer):
        return
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        found = load_tokenizer(folder)
    if type(found) is not type(tokenizer):
        raise ValueError(
            "A model is saved with a tokenizer that load_tokenizer returns: a ByteTokenizer or a JambaTokenizer. "
            f"Received: a {type(tokenizer).__name__}, whose files are read as {type(found).__name__}. Set the model's "
            "tokenizer to None before saving, and to this one after loading."
        )

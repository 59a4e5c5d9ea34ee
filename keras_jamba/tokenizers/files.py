"""Loading and saving of tokenizers in folders."""

import tempfile
from pathlib import Path
from typing import Any, Protocol

from keras_jamba import _files
from keras_jamba._typing import PathLike
from keras_jamba.tokenizers.byte_tokenizer import BYTES, ByteTokenizer
from keras_jamba.tokenizers.jamba_tokenizer import TOKENIZER, JambaTokenizer


class _Savable(Protocol):
    """A tokenizer that writes its own files."""

    def save(self, folder: Any, /) -> Any: ...


def load_tokenizer(folder: PathLike) -> ByteTokenizer | JambaTokenizer | None:
    """Returns the tokenizer in a folder, or None.

    Raises:
        ValueError: if a file is damaged.
    """
    folder = Path(folder)
    if (folder / BYTES).is_file():
        return _byte_tokenizer(folder / BYTES)
    return JambaTokenizer(folder) if (folder / TOKENIZER).is_file() else None


def _byte_tokenizer(file):
    try:
        config = _files.read_json(file)
        good = isinstance(config, dict) and config.keys() <= {"add_bos"} and type(config.get("add_bos", True)) is bool
    except (OSError, ValueError) as error:
        config, good = error, False
    if not good:
        raise ValueError(
            f"{BYTES} must be a JSON object with add_bos, true or false. Received: {str(file)!r}, {config!r}. Save the "
            "tokenizer again."
        )
    return ByteTokenizer(**config)


def save_tokenizer(tokenizer: ByteTokenizer | _Savable, folder: PathLike) -> None:
    """Writes the files that `load_tokenizer` reads.

    Each file is written atomically. No file appears if one of them cannot be written. Older files of another tokenizer
    are removed afterwards if they would be read instead. See `JambaTokenizer.save`.

    Raises:
        ValueError: for a tokenizer of another class without `save(folder)`, or with texts that UTF-8 cannot express.
        OSError: if a file cannot be written, or an older one cannot be removed.
    """
    if isinstance(tokenizer, ByteTokenizer):
        with _files.atomic_file(Path(folder) / BYTES) as staged:
            _files.write_json(staged, {"add_bos": tokenizer.add_bos}, indent=None)
    elif hasattr(tokenizer, "save"):
        tokenizer.save(folder)
    else:
        raise ValueError(
            "A tokenizer must have a method save(folder). Received: "
            f"{type(tokenizer).__name__} without one. Set the model's tokenizer to None, or add the method."
        )


def check_can_be_restored(tokenizer):
    """Raises ValueError unless `load_tokenizer` restores the class of a saved tokenizer. None is allowed.

    Raises:
        ValueError: for a tokenizer of another class without `save(folder)`, or whose files load as another class.
    """
    if tokenizer is None or type(tokenizer) in (ByteTokenizer, JambaTokenizer):
        return
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        found = load_tokenizer(folder)
    if type(found) is not type(tokenizer):
        raise ValueError(
            "A saved tokenizer must be one that load_tokenizer returns: a ByteTokenizer or a JambaTokenizer. "
            f"Received: a {type(tokenizer).__name__}, whose files load as {type(found).__name__}. Set the model's "
            "tokenizer to None before saving, and to this one after loading."
        )

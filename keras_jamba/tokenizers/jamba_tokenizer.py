"""Tokenizers of checkpoints: tokenizer.json."""

import functools
import json
from pathlib import Path

from keras_jamba.tokenizers._tokenizer import Tokenizer

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# The classes of Mamba-1's checkpoints: they name a token for the beginning, and transformers adds none.
_WITHOUT_BOS = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast")


class JambaTokenizer(Tokenizer):
    """The tokenizer of a checkpoint, by the library tokenizers, with the token for the beginning before each text.

    Args:
        folder: holds tokenizer.json, and where the checkpoint has them tokenizer_config.json, which names the special
            tokens, and chat_template.jinja.

    Raises:
        ValueError: if a file is damaged or names a token that the vocabulary does not have.
        ImportError: without the library.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self._tokenizer = _tokenizer(folder / TOKENIZER)
        self._config = _config(folder / CONFIG)
        template = folder / TEMPLATE
        self.chat_template = template.read_text("utf-8") if template.is_file() else self._config.get("chat_template")
        self.vocab_size = self._tokenizer.get_vocab_size()
        for kind in ("bos", "eos", "pad"):
            setattr(self, f"{kind}_token", self._special(kind))
            token = getattr(self, f"{kind}_token")
            setattr(self, f"{kind}_token_id", None if token is None else self._tokenizer.token_to_id(token))

    def _special(self, kind):
        token = self._config.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and self._tokenizer.token_to_id(token) is None:
            raise ValueError(
                f"The special tokens of {CONFIG} must be in {TOKENIZER}. Received: {kind}_token={token!r}, which is "
                "not. The two files are of different tokenizers."
            )
        return token

    def encode(self, text):
        """The ids of a text, beginning with the one for the beginning unless the checkpoint says add_bos_token=false
        or has the tokenizer of GPT-NeoX, as Mamba-1's do.

        Where the text begins with that token as a chat template writes it, there is still one.
        """
        usual = self._config.get("tokenizer_class") not in _WITHOUT_BOS
        adds = self.bos_token_id is not None and self._config.get("add_bos_token", usual)
        written = self.bos_token is not None and text.startswith(self.bos_token)
        ids = self._tokenizer.encode(text, add_special_tokens=not written).ids
        return ids if not adds or ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def decode(self, ids):
        """The text of ids, special ones left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def apply_chat_template(self, messages, add_generation_prompt=True, **given):
        """The text of a conversation, for `encode`.

        Args:
            messages: a list of `{"role": ..., "content": ...}`.
            add_generation_prompt: whether the answer of the assistant begins at the end.
            **given: what else the template uses: tools, for example.

        Raises:
            ValueError: if the checkpoint has no template, or the template refuses.
            ImportError: without the library jinja2.
        """
        if not isinstance(self.chat_template, str):
            raise ValueError(
                f"A conversation needs a template. Received: a tokenizer without {TEMPLATE} and without chat_template "
                f"in {CONFIG}. Set its chat_template, or write the prompt yourself."
            )
        special = {f"{kind}_token": getattr(self, f"{kind}_token") or "" for kind in ("bos", "eos", "pad")}
        given |= dict(messages=messages, add_generation_prompt=add_generation_prompt)
        return _template(self.chat_template).render(**special | given)

    def save(self, folder):
        """Writes the files that this was made of."""
        folder = Path(folder)
        self._tokenizer.save(str(folder / TOKENIZER))
        (folder / CONFIG).write_text(json.dumps(self._config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if isinstance(self.chat_template, str) and self.chat_template != self._config.get("chat_template"):
            (folder / TEMPLATE).write_text(self.chat_template, "utf-8")


def _tokenizer(file):
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise ImportError(
            f"{TOKENIZER} is read with the library tokenizers. Received: a Python without it. "
            'Install it: pip install "keras-jamba[text]".'
        ) from error
    try:
        library = Library.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(_damaged(file, error)) from error
    # Texts stand as they are: models pad and cut.
    library.no_padding()
    library.no_truncation()
    return library


def _config(file):
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
        good = isinstance(config, dict)
    except ValueError as error:
        raise ValueError(_damaged(file, error)) from error
    if not good:
        raise ValueError(_damaged(file, "no JSON object"))
    return config


def _damaged(file, error):
    return (
        f"A tokenizer must be what the library tokenizers wrote. Received: {str(file)!r}, {error}. "
        "Download the checkpoint again."
    )


@functools.lru_cache
def _template(text):
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            "Chat templates need the library jinja2. Received: a Python without it. "
            'Install it: pip install "keras-jamba[text]".'
        ) from error

    def refuse(message):
        raise ValueError(f"The chat template takes no such conversation. Received: {message}. Change the messages.")

    # A template comes from whoever made the checkpoint.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    return environment.from_string(text)

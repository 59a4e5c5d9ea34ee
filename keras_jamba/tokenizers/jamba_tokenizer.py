"""The tokenizer of a checkpoint with a tokenizer.json."""

import contextlib
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_jamba import _files
from keras_jamba._typing import PathLike, Tensor
from keras_jamba.tokenizers import _chat_encoding, _named_templates, chat_templates
from keras_jamba.tokenizers._named_templates import TEMPLATE, TEMPLATES
from keras_jamba.tokenizers._special_tokens import (
    CONFIG,
    LEGACY,
    add_special_tokens,
    source,
    special_tokens,
    tokenizer_class,
)
from keras_jamba.tokenizers._tokenizer import Tokenizer, checked_ids, checked_text
from keras_jamba.tokenizers.byte_tokenizer import BYTES

TOKENIZER = "tokenizer.json"
# The library has no larger ids.
_LARGEST_ID = 2**32 - 1
# Other arguments of transformers' apply_chat_template, and the remedy for each.
_ELSEWHERE = {
    "return_tensors": "Pass the ids to keras.ops.convert_to_tensor",
    "padding": "Call tokenizer(texts), which pads",
    "truncation": "Cut the ids",
    "max_length": "Cut the ids",
    "sanitize_control_tokens": "Remove special tokens from the messages",
    "tokenizer_kwargs": "Call encode with the text",
}


class JambaTokenizer(Tokenizer):
    """The tokenizer of a checkpoint. It encodes, decodes and renders conversations as transformers does.

    The post-processor in tokenizer.json adds the BOS and EOS tokens. As in transformers, `add_bos_token` and
    `add_eos_token` in tokenizer_config.json have no effect if there is a tokenizer.json. The class GPTNeoXTokenizer of
    Mamba-1 checkpoints adds neither token.

    Args:
        folder: holds tokenizer.json. It may also hold tokenizer_config.json and special_tokens_map.json, which name
            the special tokens, chat_template.jinja and `additional_chat_templates/*.jinja`.

    Attributes:
        chat_template: text of a Jinja template, a dict of named templates, or None.
        bos_token, eos_token, pad_token: the text of these tokens, or None.
        vocab_size, bos_token_id, eos_token_id, pad_token_id: see `Tokenizer`.

    Raises:
        ValueError: if a file is damaged or names a token that is missing in the vocabulary.
        ImportError: if the library tokenizers is not installed.
    """

    chat_template: str | dict[str, str] | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None

    def __init__(self, folder: PathLike) -> None:
        folder = Path(folder)
        self._tokenizer = _tokenizer(folder / TOKENIZER)
        self._config = _json(folder / CONFIG)
        self.chat_template = _templates(folder, self._config.pop("chat_template", None))
        model_config, legacy = _json(folder / "config.json"), _json(folder / LEGACY)
        with _type_errors_of(folder / CONFIG):
            self._config["tokenizer_class"] = tokenizer_class(self._config, model_config)
            special = special_tokens(self._tokenizer, self._config, legacy)
        self._special = {name: token.content for name, token in special.items()}
        for kind in ("bos", "eos", "pad"):
            token = self._special.get(f"{kind}_token")
            with _type_errors_of(folder / CONFIG):
                token_id = None if token is None else self._tokenizer.token_to_id(token)
            if token is not None and token_id is None:
                raise ValueError(
                    f"The special tokens of {source(f'{kind}_token', self._config, legacy)} must be in {TOKENIZER}. "
                    f"Received: {kind}_token={token!r}, which is not. Use files of the same tokenizer."
                )
            setattr(self, f"{kind}_token", token)
            setattr(self, f"{kind}_token_id", token_id)
        with _type_errors_of(folder / CONFIG):
            add_special_tokens(self._tokenizer, self._config, special)
        self.vocab_size = self._tokenizer.get_vocab_size()

    def __setstate__(self, state):
        self.__dict__.update(state)
        # Copies of the library's tokenizer lose this setting.
        self._tokenizer.encode_special_tokens = bool(self._config.get("split_special_tokens", False))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text.

        Args:
            text: a string. Special tokens in the text are encoded as special tokens.
            add_special_tokens: whether the post-processor adds its BOS and EOS tokens. BOS is not added again if the
                text begins with it, as a rendered chat template does.

        Returns:
            A list of int.

        Raises:
            ValueError: if `text` is not a string, or has a surrogate, which UTF-8 cannot express.
        """
        text = checked_text(text)
        ids = self._tokenizer.encode(text, add_special_tokens=bool(add_special_tokens)).ids
        written = add_special_tokens and self.bos_token is not None and text.startswith(self.bos_token)
        return ids[1:] if written and ids[:2] == [self.bos_token_id] * 2 else ids

    def decode(self, ids: int | Sequence[int] | Tensor) -> str:
        """Returns the text of ids without special tokens. Ids outside the vocabulary have no text."""
        return self._cleaned(self._tokenizer.decode(_possible(ids), skip_special_tokens=True))

    def decode_with_special_tokens(self, ids: int | Sequence[int] | Tensor) -> str:
        """Returns the text of ids, including special tokens. Ids outside the vocabulary have no text."""
        return self._cleaned(self._tokenizer.decode(_possible(ids), skip_special_tokens=False))

    def _cleaned(self, text):
        """Removes spaces before punctuation if tokenizer_config.json requests it. BPE restores spaces exactly."""
        if not self._config.get("clean_up_tokenization_spaces") or type(self._tokenizer.model).__name__ == "BPE":
            return text
        for mark in (".", "?", "!", ","):
            text = text.replace(f" {mark}", mark)
        text = text.replace(" ' ", "'")
        for end in ("n't", "'m", "'s", "'ve", "'re"):
            text = text.replace(f" {end}", end)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        **variables: Any,
    ) -> Any:
        """Renders a conversation in the model's training format, as transformers renders it.

        Args:
            messages: a list of `{"role": ..., "content": ...}`, or a list of such lists.
            add_generation_prompt: whether the text ends with the start of an assistant's answer.
            tools: a list of JSON schemas, dicts, of functions that the model may call, or None.
            documents: a list of `{"title": ..., "text": ...}` that the model may read, or None.
            chat_template: the name of one of several templates, or the text of another. None selects the template
                named "tool_use" if there are tools, otherwise the one named "default".
            continue_final_message: whether the text ends with the content of the last message, which the model
                continues. A string names another field of this message, such as "reasoning_content". It requires
                add_generation_prompt=False.
            tokenize: whether to return ids. No special tokens are added, because the template writes them.
            return_dict: whether to return ids and masks in a dict. It implies `tokenize`.
            return_assistant_tokens_mask: whether the dict tells which tokens the assistant wrote. These are the tokens
                with a character between `{% generation %}` and `{% endgeneration %}` of the template. It requires
                `return_dict`.
            **variables: further variables of the template.

        Returns:
            A string, or a list of int with `tokenize`. For several conversations, a list of these. With `return_dict`
            a dict of lists of int, each `(t,)`: "input_ids", "attention_mask", which is all 1, and "assistant_masks",
            which is 1 for the assistant's tokens and otherwise 0. For several conversations, a dict of lists of these.

        Raises:
            ValueError: if the checkpoint has no template, the template fails with this conversation, an argument is
                not supported, or one is nested too deeply. With `return_assistant_tokens_mask`, also if the template
                has no tag `{% generation %}`, or changes what the tag encloses, for example by a filter around it.
            ImportError: if jinja2 is not installed.
        """
        _check_variables(variables)
        _chat_encoding.check_request(return_dict, return_assistant_tokens_mask, continue_final_message)
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "A conversation must end with its last message or with the start of a new one. Received: "
                "continue_final_message and add_generation_prompt. Pass add_generation_prompt=False."
            )
        name, template = _named_templates.chosen(self.chat_template, chat_template, tools)
        special = self._special | {f"{kind}_token": getattr(self, f"{kind}_token") for kind in ("bos", "eos", "pad")}
        variables = {name: token for name, token in special.items() if token is not None} | variables
        variables |= dict(tools=_checked_dicts("tools", tools), documents=_checked_dicts("documents", documents))
        variables |= dict(add_generation_prompt=add_generation_prompt)
        several = isinstance(messages, (list, tuple)) and bool(messages) and isinstance(messages[0], (list, tuple))
        conversations = messages if several else [messages]
        if return_assistant_tokens_mask:
            rendered = [chat_templates.render_with_answers(template, each, variables, name) for each in conversations]
        else:
            given = (variables, continue_final_message, name)
            rendered = [(chat_templates.render(template, each, *given), None) for each in conversations]
        if not (tokenize or return_dict):
            found = [text for text, _ in rendered]
        else:
            found = [_chat_encoding.encoded(self._tokenizer, *each) for each in rendered]
            found = found if return_dict else [each["input_ids"] for each in found]
        if several and return_dict:
            return {key: [each[key] for each in found] for key in found[0]}
        return found if several else found[0]

    def save(self, folder: PathLike) -> None:
        """Writes the files of this tokenizer as transformers writes them.

        Each file is written atomically. No file appears if one of them cannot be written.

        Then older files are removed that loading would prefer to the new ones: chat templates,
        special_tokens_map.json and byte_tokenizer.json. Other files stay. A process that is killed, or fails, between
        the two leaves such older files beside all new ones. Loading then reads them too, and saving again removes them.

        Raises:
            ValueError: if a chat template is no text, its name is no file name, or UTF-8 cannot express a text.
            OSError: if a file cannot be written, or an older one cannot be removed.
        """
        folder = Path(folder)
        templates = _named_templates.files(self.chat_template)
        with _files.atomic_files(folder) as staged:
            try:
                self._write(staged, templates)
            except UnicodeError as error:
                raise ValueError(
                    f"The texts of a saved tokenizer must be UTF-8. Received: {error}. Replace such characters in its "
                    "chat_template and special tokens."
                ) from error
        _remove_older(folder, templates)

    def _write(self, folder, templates):
        # The library's own `save` raises no OSError on a full disk.
        (folder / TOKENIZER).write_bytes(self._tokenizer.to_str(pretty=True).encode())
        config = self._config | self._special
        config |= {f"{kind}_token": getattr(self, f"{kind}_token") for kind in ("bos", "eos", "pad")}
        config = {key: value for key, value in config.items() if value is not None}
        _files.write_json(folder / CONFIG, config, ensure_ascii=False)
        for file, text in templates.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text, "utf-8")


def _remove_older(folder, written):
    """Removes the files in `folder` that loading would prefer to those of the last save.

    Args:
        folder: a Path.
        written: the names of the chat templates of the last save. Their files stay.
    """
    # A file system may spell a name otherwise, for example in its case.
    kept = [os.lstat(folder / file) for file in written]
    named = list((folder / TEMPLATES).glob("*.jinja"))
    older = [file for name in (TEMPLATE, LEGACY, BYTES) if (file := folder / name).is_file()] + named
    older = [file for file in older if not any(os.path.samestat(os.lstat(file), each) for each in kept)]
    for file in older:
        file.unlink(missing_ok=True)
    if len(named) and not any((folder / TEMPLATES).iterdir()):
        (folder / TEMPLATES).rmdir()


def _possible(ids):
    """Returns ids as a list without those that the library refuses, such as -100 of masked labels."""
    return [i for i in checked_ids(ids) if 0 <= i <= _LARGEST_ID]


def _check_variables(variables):
    """Raises ValueError for arguments of transformers that would become variables of the template."""
    for name in variables.keys() & _ELSEWHERE.keys():
        raise ValueError(
            f"apply_chat_template returns a string, ids, or a dict of lists. Received: {name}="
            f"{reprlib.repr(variables[name])}. {_ELSEWHERE[name]}."
        )


def _checked_dicts(name, given):
    """Returns tools or documents. Raises ValueError unless they are None or a list of dicts."""
    is_list = given is None or isinstance(given, (list, tuple))
    wrong = [each for each in given or () if not isinstance(each, dict)] if is_list else [given]
    if wrong:
        raise ValueError(
            f"{name} must be a list of dicts. Received: {reprlib.repr(wrong[0])}. Pass tools as JSON schemas of "
            "functions, such as transformers.utils.get_json_schema(function) returns, and documents with a title and a "
            "text."
        )
    return given


def _templates(folder, configured):
    """Returns the chat template of a folder: a text, a dict of several, or None. Files override the config."""
    found = {}
    if (folder / TEMPLATE).is_file():
        found["default"] = _text(folder / TEMPLATE)
    for file in sorted((folder / TEMPLATES).glob("*.jinja")):
        found[file.name.removesuffix(".jinja")] = _text(file)
    if found:
        return found["default"] if set(found) == {"default"} else found
    try:
        several = isinstance(configured, list)
        configured = {each["name"]: each["template"] for each in configured} if several else configured
        texts = configured.values() if isinstance(configured, dict) else [configured]
        good = configured is None or all(isinstance(text, str) for text in texts)
    except (TypeError, KeyError):
        good = False
    if not good:
        raise ValueError(_damaged(folder / CONFIG, f"chat_template={str(configured)[:60]!r}"))
    return configured


@contextlib.contextmanager
def _type_errors_of(file):
    """Raises a ValueError that names `file` for a field of a wrong type, or a text that UTF-8 cannot express."""
    try:
        yield
    except (AttributeError, OverflowError, TypeError, UnicodeError) as error:
        raise ValueError(_damaged(file, error)) from error


def _text(file):
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(_damaged(file, error)) from error


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
    except Exception as error:  # the library raises plain Exception
        raise ValueError(_damaged(file, error)) from error
    # Models pad and truncate themselves.
    library.no_padding()
    library.no_truncation()
    return library


def _json(file):
    if not file.is_file():
        return {}
    try:
        config = _files.read_json(file)
        good = isinstance(config, dict)
    except (OSError, ValueError) as error:
        raise ValueError(_damaged(file, error)) from error
    if not good:
        raise ValueError(_damaged(file, "no JSON object"))
    return config


def _damaged(file, error):
    return (
        f"A tokenizer must be what the library tokenizers wrote. Received: {str(file)!r}, {error}. "
        "Download the checkpoint again."
    )

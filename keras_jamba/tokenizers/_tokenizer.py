"""The base class of tokenizers."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_jamba._padding import padded
from keras_jamba._typing import Array, Tensor


class Tokenizer:
    """The base class of tokenizers, which map text to token ids and back.

    A subclass defines `encode(text)`, `decode(ids)`, `vocab_size` and the ids of the special tokens.

    Attributes:
        vocab_size: the number of ids. All ids are below it.
        bos_token_id, eos_token_id, pad_token_id: int or None, the ids of the special tokens.
    """

    vocab_size: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    if TYPE_CHECKING:
        # Subclasses define both.
        def encode(self, text: str) -> list[int]: ...

        def decode(self, ids: int | Sequence[int] | Tensor) -> str: ...

    def __call__(self, texts: str | Sequence[str] | Array) -> dict[str, Array]:
        """Encodes one text or a batch of texts.

        Args:
            texts: a string for one row, or a list of strings for one row per string.

        Returns:
            `{"token_ids": (b, t) int32, "padding_mask": (b, t) bool}`, NumPy arrays. Rows are padded on the left, so
            that all texts end in the last column.

        Raises:
            ValueError: for anything else.

        Example:
            >>> from keras_jamba.tokenizers import ByteTokenizer
            >>> ByteTokenizer()("Hi!")["token_ids"].shape
            (1, 4)
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple, np.ndarray)) or not _is_row(texts):
            raise ValueError(
                "A tokenizer takes a string or a list of strings. Received: "
                f"{_described(texts)}. Pass text, or call decode for token ids and apply_chat_template for messages."
            )
        token_ids, mask = padded([self.encode(text) for text in texts], self.pad_token_id or 0)
        return {"token_ids": token_ids, "padding_mask": mask}

    def decode_with_special_tokens(self, ids: int | Sequence[int] | Tensor) -> str:
        """Returns the text of ids, including special tokens that have a text."""
        return self.decode(ids)


def _is_row(texts):
    """Returns whether a list or array has one dimension and at least one item."""
    try:
        return np.ndim(texts) == 1 and len(texts) > 0
    except ValueError:  # lists of different lengths, or nested too deeply
        return False


def checked_text(text):
    """Returns `text` as a str. Raises ValueError for another type, or for a text that UTF-8 cannot express."""
    if not isinstance(text, str):
        raise ValueError(f"encode takes a string. Received: {_described(text)}. For a list, call tokenizer(texts).")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"encode takes a string that UTF-8 can express. Received: {text[error.start]!a} at place {error.start}, "
            'half of a character. Replace such halves: text.encode("utf-8", "replace").decode().'
        ) from None
    return str(text)


def checked_ids(ids):
    """Returns `ids`, one id or a row of ids, as a list of int. Raises ValueError for anything else."""
    try:
        single = np.ndim(ids) == 0 and not isinstance(ids, (str, bytes))
        return [operator.index(i) for i in ([ids] if single else ids)]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"decode takes a row of token ids, which are integers. Received: {_described(ids)}. For a batch, call "
            "decode once per row."
        ) from error


def _described(x):
    shape = getattr(x, "shape", None)
    try:
        text = str(x)[:60]
    except RecursionError:
        text = "nested too deeply"
    return f"{type(x).__name__} {text!r}" if shape is None else f"{type(x).__name__} of shape {tuple(shape)}"

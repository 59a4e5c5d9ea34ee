"""A tokenizer with one token per byte."""

from collections.abc import Sequence

from keras_jamba._typing import Tensor
from keras_jamba.tokenizers._tokenizer import Tokenizer, checked_ids, checked_text

# Marks a folder with a ByteTokenizer, for which no other library has a file format.
BYTES = "byte_tokenizer.json"


class ByteTokenizer(Tokenizer):
    """A tokenizer with one token per UTF-8 byte, ids 0 to 255, and three special tokens.

    Args:
        add_bos: whether `encode` prepends the BOS token.

    Example:
        >>> from keras_jamba.tokenizers import ByteTokenizer
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("Hi!"), tokenizer.decode([72, 105, 33])
        ([257, 72, 105, 33], 'Hi!')
    """

    pad_token_id: int = 256
    bos_token_id: int = 257
    eos_token_id: int = 258
    vocab_size: int = 259

    def __init__(self, add_bos: bool = True) -> None:
        self.add_bos = bool(add_bos)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text. Raises ValueError if it is not a string that UTF-8 can express."""
        return [self.bos_token_id] * self.add_bos + list(checked_text(text).encode())

    def decode(self, ids: int | Sequence[int] | Tensor) -> str:
        """Returns the text of ids without special tokens. Invalid UTF-8 becomes the replacement character."""
        return bytes(i for i in checked_ids(ids) if 0 <= i < 256).decode(errors="replace")

"""A token a byte."""

from keras_jamba.tokenizers._tokenizer import Tokenizer, checked_ids, checked_text


class ByteTokenizer(Tokenizer):
    """The bytes of a text's UTF-8 as ids 0 to 255, and three special tokens.

    Args:
        add_bos: whether a text begins with the token for its beginning.

    Example:
        >>> from keras_jamba.tokenizers import ByteTokenizer
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("Hi!"), tokenizer.decode([72, 105, 33])
        ([257, 72, 105, 33], 'Hi!')
    """

    pad_token_id, bos_token_id, eos_token_id = 256, 257, 258
    vocab_size = 259

    def __init__(self, add_bos=True):
        self.add_bos = bool(add_bos)

    def encode(self, text):
        """The ids of a text."""
        return [self.bos_token_id] * self.add_bos + list(checked_text(text).encode())

    def decode(self, ids):
        """The text of ids, special ones left out; what is not UTF-8 becomes the replacement character."""
        return bytes(i for i in checked_ids(ids) if 0 <= i < 256).decode(errors="replace")

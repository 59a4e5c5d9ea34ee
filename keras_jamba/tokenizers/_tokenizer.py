"""What models need of a tokenizer."""

import numpy as np


class Tokenizer:
    """Text to ids and back; a subclass has `encode(text)`, `decode(ids)` and the ids of the special tokens.

    Attributes:
        vocab_size: ids are below it.
        bos_token_id, eos_token_id, pad_token_id: or None.
    """

    bos_token_id = eos_token_id = pad_token_id = None

    def __call__(self, texts):
        """A batch of texts, padded on the left so that all end at the last place.

        Args:
            texts: a list of strings.

        Returns:
            `{"token_ids": (b, t) int32, "padding_mask": (b, t) bool}`, NumPy arrays.
        """
        return left_padded([self.encode(text) for text in texts], self.pad_token_id or 0)


def left_padded(rows, pad_token_id):
    """`{"token_ids", "padding_mask"}` of lists of ids: rows end at the last place."""
    length = max(map(len, rows))
    token_ids = np.full((len(rows), length), pad_token_id, "int32")
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row):
            token_ids[i, -len(row) :], mask[i, -len(row) :] = row, True
    return {"token_ids": token_ids, "padding_mask": mask}

"""Padding of rows of different lengths."""

import numpy as np
from keras.utils import pad_sequences


def padded(rows, value=0, side="pre", length=None):
    """Returns rows of token ids as one padded array, and its mask.

    Args:
        rows: sequences of 32-bit integers, some of which may be empty.
        value: id of the padding.
        side: side of the padding, "pre" or "post".
        length: t, the number of columns. Longer rows are truncated at the end. None for the longest row.

    Returns:
        `(token_ids, mask)`: NumPy arrays of shape `(b, t)`, int32 and bool. The mask is False for padding.
    """
    length = max(map(len, rows), default=0) if length is None else length
    given = dict(maxlen=length, padding=side, truncating="post")
    mask = pad_sequences([np.ones(len(row), bool) for row in rows], dtype="bool", **given)
    return pad_sequences(rows, value=value, **given), mask

"""Rows of different lengths as one array."""

import numpy as np
from keras.utils import pad_sequences


def padded(rows, value=0, side="pre", length=None):
    """Token ids in one array, and where they stand in it.

    Args:
        rows: sequences of integers that fit into 32 bits; some may be empty.
        value: stands where there is no id.
        side: of the padding, "pre" or "post".
        length: t; longer rows lose their ends. None for that of the longest.

    Returns:
        `(token_ids, mask)`, NumPy arrays `(b, t)`, int32 and bool.
    """
    length = max(map(len, rows), default=0) if length is None else length
    given = dict(maxlen=length, padding=side, truncating="post")
    mask = pad_sequences([np.ones(len(row), bool) for row in rows], dtype="bool", **given)
    return pad_sequences(rows, value=value, **given), mask

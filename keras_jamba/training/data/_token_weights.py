"""Weights of the tokens of documents."""

import numpy as np


def checked_weights(weights, boundaries, one_array):
    """Returns one weight per token of all documents, as one array.

    Args:
        weights: a list of arrays, one per document; or one array, which may stay on disk.
        boundaries: the document boundaries in the tokens, `(n + 1,)`.
        one_array: whether the weights are one array.

    Raises:
        ValueError: for weights that do not belong to the tokens, are negative or not finite, or are all 0.
    """
    if not one_array:
        weights = _joined(list(weights), np.diff(boundaries))
    elif not isinstance(weights, np.ndarray) or weights.shape != (boundaries[-1],):
        raise ValueError(
            f"With boundaries, weights must be one NumPy array of shape ({boundaries[-1]},), one number per token. "
            f"Received: {_described(weights)}. Convert it with numpy.asarray, or join the weights of the documents."
        )
    good = weights.dtype.kind in "biuf"
    if not good or not (0 <= weights.min() and 0 < weights.max() < np.inf):
        values = f"values from {weights.min()} to {weights.max()}" if good else f"dtype {weights.dtype}"
        raise ValueError(
            f"weights must be finite numbers of 0 or more, at least one of them above 0. Received: {values}. Pass 1 "
            "for tokens with a loss, and 0 for the others."
        )
    return weights


def _joined(arrays, lengths):
    arrays = [np.asarray(x) for x in arrays]
    shapes, expected = [x.shape for x in arrays], [(int(length),) for length in lengths]
    found = None
    if len(shapes) != len(expected):
        found = f"{len(shapes)} arrays for {len(expected)} documents"
    elif shapes != expected:
        first = next(i for i, shape in enumerate(shapes) if shape != expected[i])
        found = f"weights[{first}] of shape {shapes[first]} for {expected[first][0]} tokens"
    if found is not None:
        raise ValueError(
            f"weights must have one array per document, with one number per token. Received: {found}. Pass arrays of "
            "the lengths of the documents."
        )
    return np.concatenate(arrays)


def _described(x):
    return f"{type(x).__name__} of shape {x.shape}" if hasattr(x, "shape") else type(x).__name__

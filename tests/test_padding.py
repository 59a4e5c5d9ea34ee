"""Rows of different lengths as one array."""

import numpy as np
import pytest
from checks import once

from keras_jamba._padding import padded

# NumPy alone.
pytestmark = once


def test_rows_are_padded_on_either_side_and_empty_ones_are_padding_alone():
    token_ids, mask = padded([[1, 2], [], [3]], value=9)
    assert token_ids.tolist() == [[1, 2], [9, 9], [9, 3]] and token_ids.dtype == "int32"
    assert mask.tolist() == [[True, True], [False, False], [False, True]] and mask.dtype == bool
    token_ids, mask = padded([np.array([1, 2]), [], [3]], value=9, side="post")
    assert token_ids.tolist() == [[1, 2], [9, 9], [3, 9]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]


@pytest.mark.parametrize("side, ids, real", [("pre", [[1, 2], [0, 1]], [0, 1]), ("post", [[1, 2], [1, 0]], [1, 0])])
def test_a_longer_row_loses_its_end_whatever_the_side(side, ids, real):
    token_ids, mask = padded([[1, 2, 3], [1]], side=side, length=2)
    assert token_ids.tolist() == ids and mask.astype(int).tolist() == [[1, 1], real]


@pytest.mark.parametrize("rows, shape", [([], (0, 0)), ([[]], (1, 0)), ([[], []], (2, 0))])
def test_without_rows_or_tokens_there_is_an_array_without_places(rows, shape):
    assert all(x.shape == shape for x in padded(rows))
    assert all(x.shape == (shape[0], 3) for x in padded(rows, length=3))


def test_an_id_that_does_not_fit_into_32_bits_is_refused():
    with pytest.raises(OverflowError):
        padded([[1], [2**32 + 3]])

"""Padding of rows of different lengths into one array."""

import numpy as np
import pytest
from checks import once

from keras_jamba._padding import padded

# Independent of the backend.
pytestmark = once


def test_rows_are_padded_on_either_side_and_empty_rows_completely():
    token_ids, mask = padded([[1, 2], [], [3]], value=9)
    assert token_ids.tolist() == [[1, 2], [9, 9], [9, 3]] and token_ids.dtype == "int32"
    assert mask.tolist() == [[True, True], [False, False], [False, True]] and mask.dtype == bool
    token_ids, mask = padded([np.array([1, 2]), [], [3]], value=9, side="post")
    assert token_ids.tolist() == [[1, 2], [9, 9], [3, 9]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]


@pytest.mark.parametrize("side, ids, real", [("pre", [[1, 2], [0, 1]], [0, 1]), ("post", [[1, 2], [1, 0]], [1, 0])])
def test_truncation_removes_the_end_for_either_side(side, ids, real):
    token_ids, mask = padded([[1, 2, 3], [1]], side=side, length=2)
    assert token_ids.tolist() == ids and mask.astype(int).tolist() == [[1, 1], real]


@pytest.mark.parametrize("rows, shape", [([], (0, 0)), ([[]], (1, 0)), ([[], []], (2, 0))])
def test_no_rows_or_tokens_give_an_empty_array(rows, shape):
    assert all(x.shape == shape for x in padded(rows))
    assert all(x.shape == (shape[0], 3) for x in padded(rows, length=3))


def test_an_id_that_does_not_fit_into_32_bits_is_refused():
    with pytest.raises(OverflowError):
        padded([[1], [2**32 + 3]])

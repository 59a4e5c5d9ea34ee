"""Every mistake gives an error with rule, received value and remedy, or NaN, or the right numbers."""

import re
from pathlib import Path

import numpy as np
import pytest
from checks import full, once
from mistakes import MISTAKES, NAN, RIGHT, tables
from mistakes.subjects import Subjects

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "mistakes.md"
# The parts of an error: rule, received value, remedy. Keras adds text to an error that a layer raises.
FORM = re.compile(r"(?s)\S.{10,}Received: .+[.\])'\"] \S.{10,}")
# Keras raises these errors before it calls the package.
KERAS_OWN = ("same number of samples", "Only input tensors may be passed")


@pytest.fixture(scope="module")
def subjects():
    return Subjects()


@full("jax", "tensorflow")
@pytest.mark.filterwarnings("ignore:.*ran out of data.*")  # Keras' warning before our error
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.entry}: {mistake.name}")
def test_no_mistake_is_silent(mistake, subjects):
    if mistake.outcome == NAN:
        try:
            found = mistake.run(subjects)
        except ValueError as error:
            assert FORM.search(str(error))
        else:
            assert np.isnan(found)
    elif mistake.outcome == RIGHT:
        found, right = mistake.run(subjects)
        if isinstance(found, list):
            assert found == right
        else:
            np.testing.assert_allclose(found, right, atol=1e-5)
    else:
        with pytest.raises((ValueError, TypeError, ImportError), match=mistake.outcome) as caught:
            mistake.run(subjects)
        if mistake.outcome not in KERAS_OWN:
            assert FORM.search(str(caught.value)), str(caught.value)


@once
def test_the_documentation_lists_at_least_sixty_mistakes():
    assert len(MISTAKES) >= 60
    assert PAGE.read_text().endswith(tables()), "Run `python -m mistakes` in tests."
    assert tables().count("\n| `") == len(MISTAKES)

"""No mistake is silent: each ends in an error with rule, received and remedy, in NaN, or in the right numbers."""

import re
from pathlib import Path

import numpy as np
import pytest
from checks import once
from mistakes import MISTAKES, NAN, RIGHT, Subjects, table

PAGE = Path(__file__).parent.parent / "docs" / "mistakes.md"
# What Keras says before anything of ours is called.
KERAS_OWN = ("same number of samples",)


@pytest.fixture(scope="module")
def subjects():
    return Subjects()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.entry}: {mistake.name}")
def test_no_mistake_is_silent(mistake, subjects):
    if mistake.outcome == NAN:
        assert np.isnan(mistake.run(subjects))
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
            rule, received, remedy = re.fullmatch(
                r"(?s)(.+?)Received: (.+?)[.\])'] ([A-Z].+)", str(caught.value)
            ).groups()
            assert len(rule) > 10 and received and len(remedy) > 10


@once
def test_there_are_sixty_and_the_documentation_lists_them():
    assert len(MISTAKES) >= 60
    assert PAGE.read_text().endswith(table()), "Run `python tests/mistakes.py`."

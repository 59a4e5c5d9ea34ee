"""A damaged file raises an error in the form of the project, or gives the numbers of the good file."""

import pytest
from checks import full, once
from tamper.formats import FORMATS
from tamper.trials import EDITED, REFUSED, SAME, Trials

# Files are read alike on every backend.
pytestmark = once


def check(kind, folder, seeds):
    trials, refused = Trials(FORMATS[kind], folder), 0
    for seed in seeds:
        place, what = trials.damaged(seed)
        end = trials.end(place)
        assert end in (REFUSED, SAME, EDITED), f"{kind}, case {seed}, {what}: {end}"
        refused += end == REFUSED
    # A test that refuses nothing would compare good files.
    assert refused > len(seeds) // (2 if FORMATS[kind].sealed else 8), refused


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_refused_or_gives_the_same_numbers(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    check(kind, tmp_path, range(16 if FORMATS[kind].sealed else 8))


@full()
@pytest.mark.parametrize("kind", FORMATS)
def test_many_damaged_files_are_refused_or_give_the_same_numbers(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    check(kind, tmp_path, range(16, 41))

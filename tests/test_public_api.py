"""The public API is the one that is written down in `tests/fixtures/public_api.txt`."""

import difflib

import api_snapshot
from checks import once

import keras_jamba

# The same on every backend.
pytestmark = once


def test_the_public_api_is_the_one_that_is_written_down():
    expected, found = api_snapshot.FILE.read_text("utf-8"), api_snapshot.listing()
    changes = difflib.unified_diff(expected.splitlines(), found.splitlines(), "written down", "found", lineterm="")
    changes = "\n".join(changes)
    assert not changes, (
        "The public API must be the one that tests/fixtures/public_api.txt lists. Received: the changes below. Where "
        "they are meant, run `python tests/helpers/api_snapshot.py --write` and name the change in CHANGELOG.md.\n"
        + changes
    )


def test_another_default_of_an_argument_is_a_change(monkeypatch):
    monkeypatch.setattr(keras_jamba.layers, "detach_state", lambda state, deep=True: state)
    assert "    detach_state(state, deep=True)\n" in api_snapshot.listing()
    assert "    detach_state(state)\n" in api_snapshot.FILE.read_text("utf-8")

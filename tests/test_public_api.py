"""The public API equals its listing in `tests/fixtures/public_api.txt`."""

import difflib

import api_snapshot
from checks import once

import keras_jamba

# Independent of the backend.
pytestmark = once


def test_the_public_api_equals_its_listing():
    expected, found = api_snapshot.FILE.read_text("utf-8"), api_snapshot.listing()
    changes = difflib.unified_diff(expected.splitlines(), found.splitlines(), "listed", "found", lineterm="")
    changes = "\n".join(changes)
    assert not changes, (
        "The public API must equal its listing in tests/fixtures/public_api.txt. Received: the changes below. If they "
        "are intended, run `python tests/helpers/api_snapshot.py --write` and name the change in CHANGELOG.md.\n"
        + changes
    )


def test_a_changed_default_of_an_argument_changes_the_listing(monkeypatch):
    monkeypatch.setattr(keras_jamba.layers, "detach_state", lambda state, deep=True: state)
    assert "    detach_state(state, deep=True)\n" in api_snapshot.listing()
    assert "    detach_state(state)\n" in api_snapshot.FILE.read_text("utf-8")

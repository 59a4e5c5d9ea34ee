"""Developer pages name existing functions and files, and each walk has its stated number of hops."""

import importlib
import re
from pathlib import Path

import pytest
from checks import once

# Independent of the backend.
pytestmark = once
ROOT = Path(__file__).parent.parent
DEVELOPMENT = ROOT / "docs" / "development"
WALKS = (DEVELOPMENT / "follow_a_tensor.md").read_text(encoding="utf-8")
MOST_HOPS = {"1": 11, "2": 10}
PAGES = [ROOT / "CONTRIBUTING.md", *sorted(DEVELOPMENT.glob("*.md"))]


def resolved(name):
    """Returns the object of a dotted name: the longest prefix that is a module, then its attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def walks():
    """Returns `{number: (stated hops, items)}`; an item is the number and the dotted name of one hop."""
    found = {}
    for section in WALKS.split("\n## ")[1:]:
        if heading := re.match(r"Walk (\d): .*\((\d+) hops\)\n", section):
            items = re.findall(r"^(\d+)\. `(keras_jamba\.[\w.]+)`", section, re.MULTILINE)
            assert len(items) == len(re.findall(r"^\d+\. ", section, re.MULTILINE))
            found[heading[1]] = int(heading[2]), items
    return found


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(keras_jamba\.[\w.]+)`", WALKS))))
def test_every_dotted_name_exists(name):
    assert resolved(name) is not None


def test_each_walk_has_the_stated_hops_and_no_more_than_allowed():
    assert walks().keys() == MOST_HOPS.keys()
    for number, (stated, items) in walks().items():
        assert [int(place) for place, _ in items] == list(range(1, stated + 1))
        assert stated <= MOST_HOPS[number]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []

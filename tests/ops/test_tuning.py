"""Tuning of the kernels on a GPU without measured rules."""

import json
from typing import NamedTuple

import keras
import pytest

from keras_jamba._triton import Gpu, tuning

if keras.backend.backend() != "torch":
    pytest.skip("the same on all backends", allow_module_level=True)


class Tile(NamedTuple):
    width: int
    depth: int


RULE, CANDIDATES = Tile(8, 4), [Tile(4, 4), Tile(2, 4), Tile(8, 4)]


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_JAMBA_TUNING", raising=False)
    tuning._known.cache_clear()
    yield tmp_path
    tuning._known.cache_clear()


def device(seconds, has_rules=False):
    """Returns a GPU on which a tile takes `seconds[width]`, and the list of the measured widths."""
    measured = []

    def clock(specs, run):
        (width,) = run(specs)
        measured.append(width)
        return seconds[width]

    return Gpu(None, None, None, 80, "A GPU", has_rules, clock), measured


def choose(gpu, kind=("bfloat16", 16)):
    if not tuning.measures(gpu):
        return RULE
    return tuning.chosen(gpu, "scan", kind, RULE, CANDIDATES, {}, lambda gpu, tile, arrays: [tile.width])


def test_the_rule_is_used_where_rules_exist_or_nothing_can_be_measured(home):
    gpu, measured = device({}, has_rules=True)
    assert choose(gpu) == choose(gpu._replace(clock=None, has_rules=False)) == RULE
    assert not measured and not list(home.iterdir())


def test_the_fastest_tile_is_measured_once_per_kind_and_saved(home):
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0})
    assert choose(gpu) == choose(gpu) == Tile(4, 4)
    assert measured == [8, 4, 2]
    assert choose(gpu, ("float32", 16)) == Tile(4, 4)
    assert measured == [8, 4, 2] * 2
    tuning._known.cache_clear()
    later, measured = device({})
    assert choose(later) == Tile(4, 4) and not measured
    elsewhere, measured = device({8: 1.0, 4: 1.0, 2: 1.0})
    assert choose(elsewhere._replace(device="Another GPU")) == RULE and measured


def test_failing_tiles_and_barely_faster_tiles_are_not_chosen(home):
    gpu, _ = device({8: float("inf"), 4: float("inf"), 2: 5.0})
    assert choose(gpu) == Tile(2, 4)
    gpu, _ = device({8: 1.0, 4: 0.97, 2: 5.0})
    assert choose(gpu, ("float16", 16)) == RULE


@pytest.mark.parametrize("entry", [[4], [4, 4, 4], 7, "ab", [None, 0], [4.0, 4], [True, 4]])
def test_an_invalid_entry_is_measured_again(home, entry):
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0})
    choose(gpu)
    tuning._known()[next(iter(tuning._known()))] = entry
    assert choose(gpu) == Tile(4, 4) and len(measured) == 6


def test_nothing_is_saved_if_every_tile_fails(home):
    gpu, _ = device({8: float("inf"), 4: float("inf"), 2: float("inf")})
    assert choose(gpu) == RULE and not list(home.iterdir())


def test_the_rule_is_used_but_not_saved_while_nothing_can_be_measured(home):
    gpu, _ = device({8: None})
    assert choose(gpu) == RULE
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0})
    assert choose(gpu) == Tile(4, 4)


DEEP = "[" * 100_000


@pytest.mark.parametrize("content", ["", "[]", '{"format": 0, "choices": {}}', '{"format": 1}', DEEP])
def test_an_invalid_file_is_overwritten(home, content):
    file = home / "keras_jamba" / "tuning.json"
    file.parent.mkdir()
    file.write_text(content)
    gpu, _ = device({8: 3.0, 4: 1.0, 2: 2.0})
    assert choose(gpu) == Tile(4, 4)
    assert list(json.loads(file.read_text())["choices"].values()) == [[4, 4]]


@pytest.mark.parametrize("plan", [[0, 0], [10**9, 10**9], [4.0, 4.0], [4], "44", [True, True]])
def test_a_plan_that_is_no_choice_is_measured_again(home, plan):
    choose(device({8: 3.0, 4: 1.0, 2: 2.0})[0])
    file = home / "keras_jamba" / "tuning.json"
    content = json.loads(file.read_text())
    content["choices"] = dict.fromkeys(content["choices"], plan)
    del content["checksum"]
    file.write_text(json.dumps(content))
    tuning._known.cache_clear()
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0})
    assert choose(gpu) == Tile(4, 4) and measured


def test_a_changed_plan_is_measured_again(home):
    choose(device({8: 3.0, 4: 1.0, 2: 2.0})[0])
    file = home / "keras_jamba" / "tuning.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"choices": dict.fromkeys(content["choices"], [2, 2])}))
    tuning._known.cache_clear()
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0})
    assert choose(gpu) == Tile(4, 4) and measured


def test_an_unwritable_folder_only_prevents_saving(home):
    (home / "keras_jamba").write_text("a file instead of the folder")
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0})
    assert choose(gpu) == choose(gpu) == Tile(4, 4) and measured == [8, 4, 2]


def test_the_environment_variable_decides_or_is_refused(home, monkeypatch):
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0}, has_rules=True)
    monkeypatch.setenv("KERAS_JAMBA_TUNING", "measure")
    assert choose(gpu) == Tile(4, 4)
    monkeypatch.setenv("KERAS_JAMBA_TUNING", "rules")
    assert choose(gpu._replace(has_rules=False)) == RULE
    monkeypatch.setenv("KERAS_JAMBA_TUNING", "fast")
    with pytest.raises(ValueError, match="Received: 'fast'"):
        choose(gpu)

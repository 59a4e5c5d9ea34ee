"""How kernels are cut on a GPU that no rules were measured on."""

import json
from typing import NamedTuple

import keras
import pytest

from keras_jamba._triton import Gpu, tuning

if keras.backend.backend() != "torch":
    pytest.skip("the same on all backends", allow_module_level=True)


class Cut(NamedTuple):
    width: int
    depth: int


RULE, OTHERS = Cut(8, 4), [Cut(4, 4), Cut(2, 4), Cut(8, 4)]


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_JAMBA_TUNING", raising=False)
    tuning._known.cache_clear()
    yield tmp_path
    tuning._known.cache_clear()


def device(seconds, has_rules=False):
    """One on which a cut takes so long, by its width; and the widths that were measured."""
    measured = []

    def clock(specs, run):
        (width,) = run(specs)
        measured.append(width)
        return seconds[width]

    return Gpu(None, None, None, 80, "A GPU", has_rules, clock), measured


def choose(gpu, kind=("bfloat16", 16)):
    if not tuning.measures(gpu):
        return RULE
    return tuning.chosen(gpu, "scan", kind, RULE, OTHERS, {}, lambda gpu, cut, arrays: [cut.width])


def test_rules_are_taken_where_they_were_measured_or_nothing_can_be(home):
    gpu, measured = device({}, has_rules=True)
    assert choose(gpu) == choose(gpu._replace(clock=None, has_rules=False)) == RULE
    assert not measured and not list(home.iterdir())


def test_the_fastest_is_found_once_for_each_class_of_shapes_and_kept_for_later(home):
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0})
    assert choose(gpu) == choose(gpu) == Cut(4, 4)
    assert measured == [8, 4, 2]
    assert choose(gpu, ("float32", 16)) == Cut(4, 4)
    assert measured == [8, 4, 2] * 2
    tuning._known.cache_clear()
    later, measured = device({})
    assert choose(later) == Cut(4, 4) and not measured
    elsewhere, measured = device({8: 1.0, 4: 1.0, 2: 1.0})
    assert choose(elsewhere._replace(device="Another GPU")) == RULE and measured


def test_what_fails_on_a_device_is_not_chosen_and_little_faster_is_not_faster(home):
    gpu, _ = device({8: float("inf"), 4: float("inf"), 2: 5.0})
    assert choose(gpu) == Cut(2, 4)
    gpu, _ = device({8: 1.0, 4: 0.97, 2: 5.0})
    assert choose(gpu, ("float16", 16)) == RULE


@pytest.mark.parametrize("entry", [[4], [4, 4, 4], 7, "ab", [None, 0], [4.0, 4], [True, 4]])
def test_an_entry_that_is_no_choice_is_measured_anew(home, entry):
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0})
    choose(gpu)
    tuning._known()[next(iter(tuning._known()))] = entry
    assert choose(gpu) == Cut(4, 4) and len(measured) == 6


def test_where_everything_fails_nothing_is_kept(home):
    gpu, _ = device({8: float("inf"), 4: float("inf"), 2: float("inf")})
    assert choose(gpu) == RULE and not list(home.iterdir())


def test_while_nothing_can_be_measured_the_rule_is_taken_and_not_kept(home):
    gpu, _ = device({8: None})
    assert choose(gpu) == RULE
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0})
    assert choose(gpu) == Cut(4, 4)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 0, "choices": {}}', '{"format": 1}'])
def test_a_file_that_is_not_ours_is_written_anew(home, content):
    file = home / "keras_jamba" / "tuning.json"
    file.parent.mkdir()
    file.write_text(content)
    gpu, _ = device({8: 3.0, 4: 1.0, 2: 2.0})
    assert choose(gpu) == Cut(4, 4)
    assert list(json.loads(file.read_text())["choices"].values()) == [[4, 4]]


def test_a_folder_that_cannot_be_written_costs_only_the_memory_of_it(home):
    (home / "keras_jamba").write_text("a file where the folder would be")
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0})
    assert choose(gpu) == choose(gpu) == Cut(4, 4) and measured == [8, 4, 2]


def test_the_variable_of_the_environment_decides_or_is_refused(home, monkeypatch):
    gpu, measured = device({8: 3.0, 4: 1.0, 2: 2.0}, has_rules=True)
    monkeypatch.setenv("KERAS_JAMBA_TUNING", "measure")
    assert choose(gpu) == Cut(4, 4)
    monkeypatch.setenv("KERAS_JAMBA_TUNING", "rules")
    assert choose(gpu._replace(has_rules=False)) == RULE
    monkeypatch.setenv("KERAS_JAMBA_TUNING", "fast")
    with pytest.raises(ValueError, match="Received: 'fast'"):
        choose(gpu)

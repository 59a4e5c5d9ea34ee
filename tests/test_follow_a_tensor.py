"""Developer pages name existing functions and files, and each walk has its stated number of hops."""

import importlib
import inspect
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from checks import once

from keras_jamba import DHCJamba, JambaCausalLM
from keras_jamba.layers import MambaLayer

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


@once
@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(keras_jamba\.[\w.]+)`", WALKS))))
def test_every_dotted_name_exists(name):
    assert resolved(name) is not None


@once
def test_each_walk_has_the_stated_hops_and_no_more_than_allowed():
    assert walks().keys() == MOST_HOPS.keys()
    for number, (stated, items) in walks().items():
        assert [int(place) for place, _ in items] == list(range(1, stated + 1))
        assert stated <= MOST_HOPS[number]


@once
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="walk 1 is that of JAX and TensorFlow")
@pytest.mark.parametrize("number", sorted(MOST_HOPS))
def test_the_hops_are_the_functions_on_the_stack(number, monkeypatch):
    hops = [resolved(name).__code__ for _, name in walks()[number][1]]
    if number == "2":
        # The stack ends above the replaced function.
        assert hops.pop() is MambaLayer.step.__code__
    stack = {"1": stack_at_the_recurrence, "2": stack_at_the_mixer}[number](monkeypatch)
    assert [frame.f_code for frame in stack if frame.f_code in hops] == hops
    others = [frame for frame in stack if frame.f_code not in hops and "._backend." not in frame.f_globals["__name__"]]
    # Between a layer's caller and its `call`, as Keras' own functions.
    names = [frame.f_code.co_qualname for frame in others]
    first, *nested = [name for name in names if name != "EagerFastPath.__call__"]
    assert first in ("DHCJamba.__call__", "JambaCausalLM.generate")
    assert all("<locals>" in name for name in nested), nested


def stack_at_the_recurrence(monkeypatch):
    """Returns the frames of the package from `DHCJamba.__call__` to the line of the recurrence."""
    from keras_jamba.ops.scan import xla_chunks

    model = DHCJamba(image_shape=(8, 8, 1), d_model=16, num_layers=1, mamba_ratio=None, moe_frequency=0)
    model.backbone.blocks[0].mixer.ssm.implementation = "portable"
    return stack_of_call(monkeypatch, xla_chunks._Layout, "over_channels", lambda: model(np.zeros((1, 8, 8, 1))))


def stack_at_the_mixer(monkeypatch):
    """Returns the frames of the package from `JambaCausalLM.generate` to the step of the mixer, for a new token."""
    model = JambaCausalLM(vocab_size=8, d_model=16, num_layers=1, mamba_ratio=None)
    run = lambda: model.generate([1, 2], max_new_tokens=2, stop_token_ids=None)  # noqa: E731
    return stack_of_call(monkeypatch, MambaLayer, "step", run, below="Decoder.advance")


class Reached(Exception):
    """Ends a walk."""


def stack_of_call(monkeypatch, owner, name, run, below=""):
    """Returns the frames of the package when `run` calls `owner.name`; `below` must be on the stack."""
    found, original = [], getattr(owner, name)

    def record(*given, **named):
        frames = [entry.frame for entry in reversed(inspect.stack(context=0))]
        frames = [frame for frame in frames if frame.f_globals["__name__"].startswith("keras_jamba.")]
        if below and not any(frame.f_code.co_qualname == below for frame in frames):
            return original(*given, **named)
        found.extend(frames)
        raise Reached

    monkeypatch.setattr(owner, name, record)
    with pytest.raises(Reached):
        run()
    return found

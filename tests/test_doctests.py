"""The examples in docstrings run and print what they state."""

import doctest
import importlib
import pkgutil
import re

import keras
import numpy as np
import pytest
from chats import chat_tokenizer
from checks import full, once

import keras_jamba

# Independent of the backend.
pytestmark = once
# Examples that a test cannot run, with the reason.
NOT_RUN = {
    "DataParallel": "torchrun must start the processes; tests/subprocess runs it",
    "layout_map": "eight devices and a checkpoint of 52 billion parameters",
}


def image_model(size=8, **more):
    sizes = dict(downsample=2, d_model=8, num_heads=2, moe_frequency=0)
    return keras_jamba.DHCJamba(10, (size, size, 3), **sizes | more)


def images(count=4, size=8):
    return {"images": np.random.default_rng(0).random((count, size, size, 3), "float32")}


def drawn():
    return {"model": image_model(), **images()}


def of_clips():
    clips = np.random.default_rng(0).random((2, 4, 8, 8, 1), "float32")
    shape = dict(image_shape=(4, 8, 8, 1), tokens="frames", d_model=8, num_layers=1, mamba_ratio=None)
    return {"model": keras_jamba.DHCJamba(3, **shape), "clips": clips}


def in_training():
    """A compiled model with experts, images and labels, and batches of them."""
    model = keras_jamba.DHCJamba(10, (8, 8, 3), downsample=4, d_model=8, num_layers=2, num_heads=2)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = images(128)["images"], np.arange(128) % 10
    batches = keras_jamba.training.Batches(data, batch_size=64)
    return {"model": model, "images": data[0], "labels": data[1], "batches": batches}


# What the examples take as given.
GIVEN = (
    {
        "decode_predictions": lambda: {"images": np.zeros((2, 8, 8, 1), "float32")},
        "PackedConversations": lambda: {"tokenizer": chat_tokenizer()},
        "Checkpoint": in_training,
        "Monitor": in_training,
        "frame_importance": of_clips,
        "draw_frame_importance": of_clips,
        "attention_maps": lambda: {"model": image_model(16, num_layers=8, num_heads=4), **images(size=16)},
        "draw_attention": lambda: {"model": image_model(num_layers=8), **images()},
    }
    | dict.fromkeys(
        ("saliency", "occlusion", "draw_saliency", "draw_occlusion", "receptive_field", "draw_receptive_field"), drawn
    )
    | dict.fromkeys(("draw_attention_matrices", "draw_token_order"), drawn)
)


def examples():
    finder = doctest.DocTestFinder()
    for module in pkgutil.walk_packages(keras_jamba.__path__, "keras_jamba."):
        if not re.match(r"keras_jamba\._(triton|backend|native)", module.name):
            found = finder.find(importlib.import_module(module.name), globs={})
            yield from (test for test in found if test.examples)


def short(test):
    return test.name.split(".")[-1]


class Checker(doctest.OutputChecker):
    """Reads PyTorch's shapes as tuples, and ignores the progress bars of Keras."""

    def check_output(self, want, got, optionflags):
        got = re.sub(r"torch\.Size\(\[(.*?)\]\)", lambda m: f"({m[1]}{',' * (',' not in m[1])})", got)
        got = "" if "ms/step" in got and not want else got
        return super().check_output(want, got, optionflags)


EXAMPLES = [test for test in examples() if short(test) not in NOT_RUN]


@full()
@pytest.mark.parametrize("test", EXAMPLES, ids=short)
def test_the_example_of_a_docstring_runs(test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    test.globs = {"np": np, "keras": keras, "keras_jamba": keras_jamba, **GIVEN.get(short(test), dict)()}
    printed = []
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=printed.append).failed == 0, "".join(printed)


def test_enough_examples_are_found_and_a_wrong_one_fails():
    assert len(EXAMPLES) >= 40
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(Checker()).run(wrong, out=lambda text: None).failed == 1

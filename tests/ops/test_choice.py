"""Choice of an implementation, and the reasons when none is available."""

import logging

import keras
import numpy as np
import pytest

from keras_jamba.ops import _implementations, causal_depthwise_conv, implementations, selective_scan


def inputs(**changes):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    tensors = {"u": normal(1, 3, 4), "delta": normal(1, 3, 4), "A": -np.ones((4, 2), "float32")}
    return tensors | {"B": normal(1, 3, 2), "C": normal(1, 3, 2)} | changes


def test_all_implementations_of_the_scan_are_available():
    assert implementations() == {"native": None, "portable": None, "associative": None, "reference": None}


def test_an_unknown_implementation_is_refused_with_the_known_names():
    with pytest.raises(
        ValueError, match="'associative', 'exported', 'native', 'portable', 'reference'.*Received.*'fastest'"
    ):
        selective_scan(**inputs(), implementation="fastest")


def test_the_environment_variable_chooses_and_an_argument_overrides_it(monkeypatch, caplog):
    monkeypatch.setattr(_implementations, "_logged", set())
    monkeypatch.setenv("KERAS_JAMBA_SCAN", "reference")
    with caplog.at_level(logging.INFO, "keras_jamba"):
        selective_scan(**inputs())
        selective_scan(**inputs())
        selective_scan(**inputs(), implementation="associative")
    assert [r.getMessage() for r in caplog.records] == [
        "selective_scan runs as 'reference'",
        "selective_scan runs as 'associative'",
    ]
    monkeypatch.setenv("KERAS_JAMBA_SCAN", "quick")
    with pytest.raises(ValueError, match="Received: implementation='quick'"):
        selective_scan(**inputs())


def test_a_refusal_gives_every_reason():
    class Refuses:
        @staticmethod
        def why_not(call):
            return "it is Tuesday"

    with pytest.raises(ValueError, match="No implementation of x.*'a': it is Tuesday; 'b': it is Tuesday"):
        _implementations.choose("x", {"a": Refuses, "b": Refuses}, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"B": np.zeros((1, 3, 5), "float32")}, r"B must have the shape \(b, t, n\).*Received: B.shape=\(1, 3, 5\)"),
        ({"A": np.zeros((4,), "float32")}, r"A must have the shape \(e, n\).*Received"),
        ({"u": np.zeros((1, 3, 4), "int32")}, "u must be a floating-point tensor. Received.*int32"),
        ({"mask": np.ones((1, 3, 3), bool)}, r"mask must have the shape \(b, t\) = \(1, 3\).*Received.*\(1, 3, 3\)"),
        ({"segment_ids": np.ones((1, 4), "int32")}, r"segment_ids must have the shape \(b, t\) = \(1, 3\).*Received"),
        ({"segment_ids": np.ones((1, 3), "float32")}, "segment_ids must be integers.*Received.*float32"),
    ],
)
def test_bad_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs(**changes))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="requires tensors with a known device; runs on torch")
def test_cpu_tensors_use_the_native_kernels_although_a_gpu_is_present(monkeypatch, caplog):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_implementations, "_logged", set())
    with caplog.at_level(logging.INFO, "keras_jamba"):
        selective_scan(**{name: torch.as_tensor(x) for name, x in inputs().items()})
        causal_depthwise_conv(torch.ones(1, 3, 4), torch.ones(2, 4))
    assert [r.getMessage() for r in caplog.records] == [
        "selective_scan runs as 'native'",
        "causal_depthwise_conv runs as 'native'",
    ]

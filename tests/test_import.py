"""Errors and notices of an import without a backend or without the C library."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from checks import once
from keras import ops

from keras_jamba import _native
from keras_jamba.ops import _implementations, causal_depthwise_conv, selective_scan

pytestmark = once


def imported(backend, missing=()):
    code = "".join(f"import sys; sys.modules[{name!r}] = None\n" for name in missing) + "import keras_jamba"
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"} | {"KERAS_HOME": os.devnull}
    environment |= {"KERAS_BACKEND": backend} if backend else {}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("backend", [None, "tensorflow"])
def test_a_missing_backend_is_named_with_its_environment_variable(backend):
    done = imported(backend, missing=["tensorflow"])
    assert done.returncode == 1
    assert f"Received: KERAS_BACKEND={backend}, No module named 'tensorflow" in done.stderr.replace("import of ", "")
    assert "Set KERAS_BACKEND to an installed one of jax, tensorflow, torch" in done.stderr


@pytest.mark.parametrize("backend", ["numpy", "openvino", "pytorch"])
def test_other_backends_are_refused(backend):
    done = imported(backend)
    assert done.returncode == 1
    assert f"runs on the Keras backends jax, tensorflow, torch. Received: KERAS_BACKEND={backend!r}" in done.stderr


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(_native, "_library", "its C library is not built: with a C compiler there, install it again")
    monkeypatch.setattr(_implementations, "_noticed", [])


def test_a_missing_library_is_logged_once(without_library, caplog):
    x = ops.ones((1, 3, 2))
    with caplog.at_level(logging.WARNING, "keras_jamba"):
        # An implementation that the user names gives no notice.
        causal_depthwise_conv(x, ops.ones((2, 2)), implementation="portable")
        assert not caplog.records
        for _ in range(2):
            causal_depthwise_conv(x, ops.ones((2, 2)))
            selective_scan(x, x, -ops.ones((2, 4)), ops.ones((1, 3, 4)), ops.ones((1, 3, 4)))
    (record,) = caplog.records
    assert "runs as 'portable', which is several times slower on a CPU than 'native'" in record.getMessage()
    assert "its C library is not built: with a C compiler there, install it again" in record.getMessage()


def test_widths_may_be_numpy_integers():
    import json

    import keras_jamba

    sizes = dict(d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, d_ff=8, num_experts=2, num_experts_per_token=1)
    model = keras_jamba.DHCJamba(np.int64(3), image_shape=(8, 8, 1), **{k: np.int64(v) for k, v in sizes.items()})
    json.dumps(model.get_config())
    for layer in model._flatten_layers(include_self=False):
        if type(layer).__module__.startswith("keras_jamba"):
            json.dumps(layer.get_config())
    layers = keras_jamba.layers
    for layer in (
        layers.MambaLayer(np.int32(8), d_state=np.int64(4), dt_max=np.float32(0.1)),
        layers.GatedConvLayer(np.int32(8)),
        layers.AttentionLayer(np.int32(8), num_heads=np.int64(2)),
        layers.MoELayer(np.int64(8), num_experts=np.int64(2)),
        layers.SpatialEncoder(np.int64(8), downsample=np.int64(2)),
    ):
        json.dumps(layer.get_config())

"""The kernels in Triton, which here are interpreted."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

TESTS = Path(__file__).parent.parent


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the interpreter works on PyTorch's tensors")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("script", sorted(file.name for file in TESTS.glob("interpreted_*.py")))
def test_kernels_compute_what_they_should_and_all_gradients(script):
    # Whether kernels are interpreted is decided when Triton is imported.
    done = subprocess.run(
        [sys.executable, TESTS / script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("all are equal")

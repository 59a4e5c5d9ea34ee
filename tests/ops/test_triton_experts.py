"""The kernels of the experts in Triton, which here are interpreted."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

SCRIPT = Path(__file__).parent.parent / "interpreted_experts.py"


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the interpreter works on PyTorch's tensors")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_compute_experts_and_all_gradients():
    # Whether kernels are interpreted is decided when Triton is imported.
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("all are equal")

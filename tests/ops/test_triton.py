"""The kernels in Triton, which here are interpreted."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from checks import full

from keras_jamba._triton import convolution, step

SCRIPTS = Path(__file__).parent.parent / "subprocess"


@full()
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the interpreter works on PyTorch's tensors")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("script", sorted(file.name for file in SCRIPTS.glob("interpreted_*.py")))
def test_kernels_compute_what_they_should_and_all_gradients(script):
    # Whether kernels are interpreted is decided when Triton is imported.
    done = subprocess.run(
        [sys.executable, SCRIPTS / script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("all are equal")


@pytest.mark.parametrize("b, t", [(1, 1), (1, 5), (1, 100), (1, 2048), (8, 2048), (4, 100_000)])
@pytest.mark.parametrize("k, e", [(1, 1), (4, 3), (4, 64), (5, 1536), (8, 2048)])
@pytest.mark.parametrize("each", [2, 4, 8])
def test_a_tile_of_the_convolution_is_one_that_its_kernels_can_take(b, t, k, e, each):
    tile = convolution.tile_for(b, t, (k, e), each)
    assert all(size & (size - 1) == 0 for size in (tile.block, tile.runs, tile.strip))
    # Tokens are asked for a turn ahead, and so are those that a run needs of the one after it.
    assert tile.count >= k - 1 and tile.strip % tile.count == 0
    # Programs of all of a warp's threads, and not more tokens than there are by far.
    assert tile.block * tile.runs == 32 * tile.warps * each
    assert tile.warps == 1 or tile.runs * tile.strip < 4 * t


@pytest.mark.parametrize("b, e", [(1, 2048), (1, 8192), (64, 2048), (512, 8192), (6, 4096), (513, 1536)])
def test_a_tile_of_the_scans_step_divides_the_rows_and_keeps_the_gpu_busy(b, e):
    rows, block, warps = step.tile_for(b, e, 16)
    assert b % rows == 0 and block * 16 == warps * 128
    assert b // rows * -(-e // block) >= 256

"""The Triton kernels in Triton's interpreter, and their tiles."""

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
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the interpreter requires PyTorch tensors")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("script", sorted(file.name for file in SCRIPTS.glob("interpreted_*.py")))
def test_interpreted_kernels_match_their_references_and_gradients(script):
    # Triton decides at import whether it interprets kernels.
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
def test_convolution_tiles_meet_the_requirements_of_the_kernels(b, t, k, e, each):
    tile = convolution.tile_for(b, t, (k, e), each)
    assert all(size & (size - 1) == 0 for size in (tile.block, tile.runs, tile.strip))
    # Tokens are loaded one step ahead, with the k - 1 tokens that a run needs from the next run.
    assert tile.count >= k - 1 and tile.strip % tile.count == 0
    # All threads of a warp have work, and tiles are not much longer than the sequence.
    assert tile.block * tile.runs == 32 * tile.warps * each
    assert tile.warps == 1 or tile.runs * tile.strip < 4 * t


@pytest.mark.parametrize("b, e", [(1, 2048), (1, 8192), (64, 2048), (512, 8192), (6, 4096), (513, 1536)])
def test_tiles_of_a_scan_step_divide_the_rows_and_occupy_the_gpu(b, e):
    rows, block, warps = step.tile_for(b, e, 16)
    assert b % rows == 0 and block * 16 == warps * 128
    assert b // rows * -(-e // block) >= 256

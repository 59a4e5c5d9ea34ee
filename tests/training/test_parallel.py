"""Replicas that share a batch end with the weights of one device that has all of it."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from checks import full

from keras_jamba import training
from keras_jamba.training.checkpointing import _saves

BACKEND = keras.backend.backend()
SCRIPT = Path(__file__).parent.parent / "subprocess" / "parallel_run.py"
REPLICAS = {"jax": 4, "tensorflow": 2, "torch": 2}[BACKEND]


def run(output, which, replicas):
    """Returns per process: the losses, the gradient norm, the number of replicas and the weights."""
    output.mkdir()
    command = [sys.executable]
    if BACKEND == "torch" and replicas > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(replicas), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, SCRIPT, output, which, str(replicas)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = []
    for path in sorted(output.glob("*.npz")):
        with np.load(path) as file:
            results.append([file[f"arr_{i}"] for i in range(len(file.files))])
    return results


@full()
# Only on JAX is a step one program. Elsewhere batch norm and expert losses see the rows of one replica.
@pytest.mark.parametrize("which", ["backbone", "images"] if BACKEND == "jax" else ["backbone"])
def test_losses_norms_and_weights_are_those_of_one_device(tmp_path, which):
    ((losses, norm, count, *weights),) = run(tmp_path / "one", which, 1)
    results = run(tmp_path / "many", which, REPLICAS)
    # On PyTorch each process logs the loss of its own rows.
    assert len(results) == (REPLICAS if BACKEND == "torch" else 1)
    step, processes = _saves.last(tmp_path / "many" / "saves", 1)
    assert step == 4 and processes == len(results)
    np.testing.assert_allclose(np.mean([end[0] for end in results], axis=0), losses, atol=1e-5)
    # The gradient norm exceeds the clipping norm of 0.1, so the steps are clipped.
    assert count == 1 and norm > 0.1
    for _, parallel_norm, replicas, *parallel_weights in results:
        assert replicas == REPLICAS
        np.testing.assert_allclose(parallel_norm, norm, rtol=1e-4)
        for found, expected in zip(parallel_weights, weights, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_model_without_variables_is_refused(monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555").items():
        monkeypatch.setenv(name, value)
    model = keras.Sequential([keras.layers.Dense(3)])
    with training.DataParallel() as parallel, pytest.raises(ValueError, match="must have its variables.*Received"):
        parallel.prepare(model)


@pytest.mark.skipif(BACKEND != "torch", reason="about torchrun; runs on torch")
def test_pytorch_outside_of_torchrun_is_refused_with_the_command():
    with pytest.raises(RuntimeError, match="Received: an environment without.*RANK.*torchrun"), training.DataParallel():
        pass
    with pytest.raises(ValueError, match="Received: devices=.*Leave it out"), training.DataParallel(["cuda:0"]):
        pass


@pytest.mark.skipif(BACKEND != "tensorflow", reason="about mirrored variables; runs on tensorflow")
def test_tensorflow_refuses_a_model_made_outside_of_the_scope():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    with training.DataParallel(["CPU:0"]) as parallel, pytest.raises(ValueError, match="made outside.*Make it inside"):
        parallel.prepare(model)

"""Models sharded over devices: JAX in a process with 8 devices, and the errors of the other backends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from checks import full

import keras_jamba
from keras_jamba import training
from keras_jamba.training.checkpointing import _saves, _snapshots

BACKEND = keras.backend.backend()


def start(script, *arguments, devices=8):
    """Starts a test script in a process with `devices` devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, Path(__file__).parent.parent / "subprocess" / script, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": flags}, **pipes)


def assert_all_are_equal(process):
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert "all are equal" in out


@full()
@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution.ModelParallel requires JAX")
def test_models_sharded_over_devices_take_the_steps_of_one_device():
    assert_all_are_equal(start("sharded_models.py"))


@full()
@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution.ModelParallel requires JAX")
@pytest.mark.parametrize("more", [[], ["large"]], ids=["small", "large"])
def test_a_checkpoint_loads_onto_devices_without_a_complete_matrix_on_any_and_generates_the_same(tmp_path, more):
    assert_all_are_equal(start("sharded_loading.py", tmp_path / "checkpoint", *more))


@full()
@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution.ModelParallel requires JAX")
def test_the_loss_in_chunks_is_that_of_one_device():
    assert_all_are_equal(start("sharded_loss.py", devices=2))


@full()
@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution.ModelParallel requires JAX")
def test_sharded_models_resume_on_any_mesh_and_save_the_usual_presets(tmp_path):
    assert_all_are_equal(start("sharded_saving.py", tmp_path))


@full()
@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution.ModelParallel requires JAX")
def test_a_killed_save_of_a_sharded_model_leaves_the_previous_save(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(2):
        process = start("sharded_saving.py", tmp_path, "forever")
        before = max(_snapshots.steps(tmp_path), default=0)
        while process.poll() is None and max(_snapshots.steps(tmp_path), default=0) <= before + 1:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        out, err = process.communicate()
        step, processes = _saves.last(tmp_path, 1)
        assert processes == 1 and step > before + 1, out + err
        assert _saves.damaged([tmp_path], step) is None
        arrays = [array.read() for array in _saves.read([tmp_path], step, 0)[0]]
        assert all((array == step).all() for array in arrays if array.dtype == "float32")


@full()
@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution.ModelParallel requires JAX")
def test_a_model_sharded_over_processes_resumes_from_a_complete_save(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    first, second = (start("processes_saving.py", tmp_path, i, port, devices=4) for i in range(2))
    try:
        out, err = second.communicate(timeout=400)
    finally:
        for process in (first, second):  # the first process waits for the second
            process.kill()
            process.communicate()
    assert second.returncode == -signal.SIGKILL and "all are equal" in out, out + err
    # Only the first process has saved step 8.
    assert [max(_snapshots.steps(place)) for place in _saves.folders(tmp_path / "saves", 2)] == [8, 7]
    assert _saves.last(tmp_path / "saves", 1) == (7, 2)
    assert_all_are_equal(start("processes_saving.py", tmp_path))


@pytest.mark.skipif(BACKEND == "jax", reason="JAX supports layout maps")
def test_backends_without_sharding_refuse_a_layout_map():
    with pytest.raises(ValueError, match="on JAX alone"):
        training.layout_map(None)


@pytest.mark.skipif(BACKEND != "jax", reason="other backends have no layout")
def test_a_mesh_without_two_axes_is_refused():
    mesh = keras.distribution.DeviceMesh((1,), ("batch",), keras.distribution.list_devices("cpu")[:1])
    with pytest.raises(ValueError, match="number of axes of the mesh"):
        training.layout_map(mesh)


@pytest.mark.skipif(BACKEND != "jax", reason="other backends have no layout")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vocab_size=9), "(?s)vocab_size must be a multiple.*vocab_size=9, and 2 devices on the axis 'model'"),
        (dict(num_experts=3), "num_experts must be a multiple"),
        (dict(d_ff=5, moe_frequency=0), "d_ff must be a multiple"),
        (dict(d_model=9, expand=1), "expand . d_model must be a multiple"),
        (dict(mamba_ratio=0, num_heads=1, d_model=9, use_rope=False, moe_frequency=0, d_ff=4), "d_model must be"),
    ],
)
def test_sizes_that_the_devices_cannot_share_are_refused(monkeypatch, change, message):
    mesh = SimpleNamespace(model="model", batch="batch", sequence=False, layouts_at_use=None, count=lambda axis: 2)
    monkeypatch.setattr("keras_jamba._backend.sharding.active_mesh", lambda: mesh)
    with pytest.raises(ValueError, match=message):
        keras_jamba.JambaCausalLM(**dict(vocab_size=8, d_model=8, num_layers=2, num_experts=4) | change)


@full("jax", "tensorflow")
@pytest.mark.skipif(BACKEND == "jax", reason="JAX supports ModelParallel")
def test_a_distribution_without_effect_is_refused_in_training():
    model = keras_jamba.JambaCausalLM(vocab_size=8, d_model=8, num_layers=1, num_heads=1)
    model.compile("sgd")
    tokens = np.zeros((2, 5), "int32")
    given = SimpleNamespace(get_tensor_layout=lambda path: None, get_variable_layout=lambda variable: None)
    keras.distribution.set_distribution(given)
    try:
        with pytest.raises(RuntimeError, match="(?s)only on JAX.*training.DataParallel"):
            model.fit(tokens, verbose=0)
    finally:
        keras.distribution.set_distribution(None)
    model.fit(tokens, verbose=0)


@pytest.mark.skipif(BACKEND != "torch", reason="fully_shard is PyTorch's")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_model_with_fully_sharded_modules_is_refused_in_training(tmp_path):
    import torch

    model = keras_jamba.JambaCausalLM(vocab_size=8, d_model=8, num_layers=1, num_heads=1)
    model.compile("sgd")
    tokens = np.zeros((2, 5), "int32")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match="training.DataParallel"):
            model.fit(tokens, verbose=0)
    finally:
        torch.distributed.destroy_process_group()

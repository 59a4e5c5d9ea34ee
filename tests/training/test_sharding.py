"""Models split among devices: what JAX does, in a process with 8 of them, and what the other backends say."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import keras_jamba
from keras_jamba import training

BACKEND = keras.backend.backend()


@pytest.mark.skipif(BACKEND != "jax", reason="split by keras.distribution.ModelParallel, on JAX")
def test_models_split_among_devices_take_the_steps_of_one():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    script = Path(__file__).parent.parent / "sharded_models.py"
    done = subprocess.run(
        [sys.executable, script], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all are equal" in done.stdout


@pytest.mark.skipif(BACKEND == "jax", reason="JAX can")
def test_backends_that_split_no_model_say_so():
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
def test_a_size_that_the_devices_cannot_share_is_refused(monkeypatch, change, message):
    parts = SimpleNamespace(model="model", batch="batch", sequence=False, at_use=None, count=lambda axis: 2)
    monkeypatch.setattr("keras_jamba._backend.parts", lambda: parts)
    with pytest.raises(ValueError, match=message):
        keras_jamba.JambaCausalLM(**dict(vocab_size=8, d_model=8, num_layers=2, num_experts=4) | change)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX splits them")
def test_a_distribution_that_splits_nothing_is_refused_in_training():
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
def test_a_model_whose_modules_were_split_is_refused_in_training(tmp_path):
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

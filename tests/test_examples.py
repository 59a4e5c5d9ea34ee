"""Every example runs with --smoke and writes its promised files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from checks import full, once

import keras_jamba

ROOT = Path(__file__).parent.parent


def python(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"KERAS_BACKEND": keras.backend.backend(), "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on(*backends):
    """Marks an example that runs on some backends; image classification runs on all three."""
    reason = f"runs on {' and '.join(backends)}"
    return pytest.mark.skipif(keras.backend.backend() not in backends, reason=reason)


@full()
def test_image_classification_trains_and_draws(tmp_path):
    output = python(ROOT / "examples" / "image_classification.py", "--smoke", "--output", tmp_path, cwd=tmp_path)
    for name in ("DHCJamba", "SVC", "kNN-3"):
        assert re.search(rf"{name} +\d+\.\d\d % of the test images right", output)
    for picture in ("learning_curve", "confusion_matrix"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "expert_usage.png").exists()  # there are no experts
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["backend"] == keras.backend.backend() and results["dataset"] == "digits"
    model = keras_jamba.DHCJamba.from_preset(tmp_path / "model")
    assert model.predict(np.zeros((2, 8, 8, 1), "float32"), verbose=0).shape == (2, 10)


@full()
@on("tensorflow", "torch")
def test_video_classification_trains_streams_and_draws(tmp_path):
    arguments = ("--smoke", "--task", "order", "--output", tmp_path)
    output = python(ROOT / "examples" / "video_classification.py", *arguments, cwd=tmp_path)
    assert re.search(r"12 frames +\d+\.\d\d % of 200 new clips", output)
    assert re.search(r"those of the complete clip to [0-9]e-0[6-9]", output)
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text())["task"] == "order"
    model = keras_jamba.DHCJamba.from_preset(tmp_path / "model")
    assert model.predict(np.zeros((2, 5, 12, 12, 1), "float32"), verbose=0).shape == (2, 6)


@full()
@on("tensorflow", "torch")
def test_text_generation_trains_compares_and_generates(tmp_path):
    output = python(ROOT / "examples" / "text_generation.py", "--smoke", "--output", tmp_path, cwd=tmp_path)
    for name in ("Jamba", "attention", "Mamba", "xz", "gzip", "xz, behind the training text"):
        assert re.search(rf"^ *{name} +\d+\.\d\d bits per byte", output, re.MULTILINE)
    assert "Return the " in output
    assert (tmp_path / "bits_per_byte.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text())["backend"] == keras.backend.backend()
    model = keras_jamba.JambaCausalLM.from_preset(tmp_path / "model")
    assert model.generate("def ", max_new_tokens=2, strip_prompt=True) is not None


@full()
@on("jax")
def test_training_on_several_devices_shards_learns_and_saves(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4")
    arguments = ("--smoke", "--mesh", "2x2", "--fully-sharded", "--output", tmp_path)
    output = python(ROOT / "examples" / "several_devices.py", *arguments, cwd=tmp_path)
    assert "59,021 parameters; 0.1 MB of them on each device" in output
    assert re.search(r"^loss 5\.\d+$", output, re.MULTILINE)
    assert list((tmp_path / "saves").glob("step_*")) and (tmp_path / "log.csv").exists()


@full()
@on("tensorflow", "torch")
def test_image_classification_reads_a_folder_of_images(tmp_path):
    from PIL import Image

    for name, shade in (("dark", 30), ("light", 220)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (9, 7), (shade, shade, i)).save(tmp_path / "data" / name / f"{i}.png")
    experts = dict(d_model=16, num_layers=2, mamba_ratio=1, moe_frequency=2, num_experts=4)
    keras_jamba.DHCJamba(2, (8, 8, 3), downsample=2, **experts).save_to_preset(tmp_path / "sizes")
    arguments = (
        "--smoke",
        "--dataset",
        tmp_path / "data",
        "--preset",
        tmp_path / "sizes",
        "--output",
        tmp_path / "out",
    )
    output = python(ROOT / "examples" / "image_classification.py", *arguments, cwd=tmp_path)
    assert "64 training images, 16 test images" in output
    assert (tmp_path / "out" / "expert_usage.png").read_bytes().startswith(b"\x89PNG")


@full()
@once
def test_an_unknown_data_set_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "image_classification.py", "--dataset", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "--dataset must be digits, cifar10" in done.stderr and "Received: 'nowhere'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@full()
@on("torch")
def test_an_exported_stream_runs_without_keras(tmp_path):
    clips = keras_jamba.DHCJamba.from_preset("video_direction")
    keras_jamba.export(clips, tmp_path / "direction.onnx", "onnx", streaming=True, capacity=64)
    output = python(ROOT / "examples" / "onnx_stream.py", tmp_path / "direction.onnx", cwd=tmp_path)
    lines = output.splitlines()
    assert len(lines) == 25 and lines[-1].endswith("frames per second")
    # The square moves to the right.
    found = int(lines[-2].split("class ")[1].split(",")[0])
    assert clips.class_names[found] == "right"

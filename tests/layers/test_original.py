"""Compares our layers with recorded outputs of the project whose architecture document we implement."""

from pathlib import Path

import numpy as np
import pytest
from checks import numpy
from safetensors.numpy import load_file

from keras_jamba.layers import AttentionLayer, FeedForward, MambaLayer, MoELayer

FOLDER = Path(__file__).parent.parent / "golden" / "dhc_original"


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(FOLDER / "golden.npz"))


def built(layer, assignments):
    layer.build((None, None, 16))
    for name, value in assignments.items():
        target = layer
        for part in name.split("."):
            target = getattr(target, part)
        target.assign(value)
    return layer


def assert_equal(actual, expected):
    np.testing.assert_allclose(numpy(actual), expected, rtol=1e-4, atol=2e-5)


def test_mamba_layer_equals_the_original(recorded):
    w = load_file(FOLDER / "mamba.safetensors")
    kernels = {f"{n}.kernel": w[f"{n}.weight"].T for n in ("in_proj", "out_proj")}
    kernels |= {f"ssm.{n}.kernel": w[f"{n}.weight"].T for n in ("x_proj", "dt_proj")}
    layer = built(
        MambaLayer(16, d_state=4),
        kernels
        | {"ssm.conv_kernel": w["conv1d.weight"][:, 0].T, "ssm.conv_bias_weight": w["conv1d.bias"]}
        | {"ssm.dt_bias": w["dt_proj.bias"], "ssm.A_log": w["A_log"], "ssm.D": w["D"]},
    )
    assert_equal(layer(recorded["x"]), recorded["mamba"])


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_layer_with_interleaved_rope_equals_the_original(recorded, causal):
    w = load_file(FOLDER / f"attn_causal{causal}.safetensors")
    layer = built(
        AttentionLayer(16, num_heads=4, num_kv_heads=2, causal=bool(causal)),
        {f"{n}.kernel": w[f"{n}.weight"].T for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
    )
    assert_equal(layer(recorded["x"]), recorded[f"attn_causal{causal}"])


def test_feed_forward_layer_equals_the_original(recorded):
    w = load_file(FOLDER / "ffn.safetensors")
    gate, up = np.split(w["fc1.weight"], 2)
    layer = built(
        FeedForward(16),
        {"gate_proj.kernel": gate.T, "up_proj.kernel": up.T, "down_proj.kernel": w["fc2.weight"].T},
    )
    assert_equal(layer(recorded["x"]), recorded["ffn"])


@pytest.mark.parametrize("swiglu", [0, 1])
def test_moe_layer_equals_the_original(recorded, swiglu):
    w = load_file(FOLDER / f"moe_swiglu{swiglu}.safetensors")
    first = np.stack([w[f"experts.{i}.fc1.weight"].T for i in range(4)])
    banks = {"down_bank": np.stack([w[f"experts.{i}.fc2.weight"].T for i in range(4)])}
    if swiglu:
        banks["gate_bank"], banks["up_bank"] = np.split(first, 2, axis=2)
    else:
        banks["up_bank"] = first
    layer = built(
        MoELayer(16, num_experts=4, use_swiglu=bool(swiglu), balance_coefficient=1e-3, squared_z_loss=False),
        banks | {"router.kernel": w["gate.weight"].T},
    )
    outputs, routing = layer(recorded["x"], return_routing=True)
    assert_equal(outputs, recorded[f"moe_swiglu{swiglu}"])
    assert_equal(routing["logits"], recorded[f"moe_swiglu{swiglu}_router"])
    np.testing.assert_allclose(numpy(layer.aux_loss), recorded[f"moe_swiglu{swiglu}_aux"], rtol=1e-4)

"""Every constructor argument of `JambaBackbone` is a field of its config and reaches the layers."""

import inspect

import keras
import pytest
from checks import once

from keras_jamba import JambaBackbone, _keras_internals
from keras_jamba.layers import Router
from keras_jamba.models._backbone_config import BACKBONE_ARGUMENTS

# Configs are equal on every backend.
pytestmark = once

SIZES = dict(d_model=16, num_layers=4, mamba_ratio=1, num_heads=4, num_kv_heads=2, num_experts=4, d_ff=24, dt_rank=2)
# A value other than the default or `SIZES` per argument.
OTHER = dict(
    d_model=32,
    num_layers=5,
    mamba_ratio=3,
    attention_offset=0,
    moe_frequency=1,
    moe_offset=0,
    num_experts=3,
    num_experts_per_token=1,
    d_ff=20,
    use_swiglu=False,
    num_heads=2,
    num_kv_heads=4,
    use_rope=False,
    rope_theta=500.0,
    rope_interleaved=False,
    attention_window=3,
    attention_sinks=2,
    direction="bidirectional",
    mixer="gated_conv",
    d_state=8,
    d_conv=3,
    expand=3,
    dt_rank=3,
    conv_bias=False,
    proj_bias=True,
    mixer_rms_norm=False,
    normalize_top_k=False,
    balance_loss="switch",
    balance_coefficient=0.5,
    squared_z_loss=False,
    z_coefficient=0.5,
    capacity_factor=2.0,
    balance_over="model",
    router=Router(4, 1),
    dropout=0.25,
    drop_path=0.25,
    epsilon=1e-3,
    quantization="int8",
    gradient_checkpointing=True,
)


def arguments():
    return [name for name in inspect.signature(JambaBackbone).parameters if name not in ("dtype", "name", "kwargs")]


def test_the_config_has_the_arguments_of_the_backbone_in_their_order():
    assert list(BACKBONE_ARGUMENTS) == arguments()


def test_the_table_has_another_value_for_every_argument():
    defaults = inspect.signature(JambaBackbone).parameters
    assert list(OTHER) == arguments()
    for name, value in OTHER.items():
        assert value != SIZES.get(name, defaults[name].default), name


def layer_configs(**changed):
    """Returns the configs of all layers of a backbone, and their `adds_loss` flags."""
    backbone = JambaBackbone(**SIZES | changed)
    layers = _keras_internals.sublayers(backbone, include_self=False)
    configs = [keras.saving.serialize_keras_object(layer) for layer in layers]
    return configs, [getattr(layer, "adds_loss", None) for layer in layers]


# `gradient_checkpointing` acts in the call of the backbone; tests/models/test_checkpointing.py tests it.
@pytest.mark.parametrize("name", [name for name in OTHER if name != "gradient_checkpointing"])
def test_every_argument_changes_a_layer(name):
    others = {"attention_window": 3} if name == "attention_sinks" else {}
    assert layer_configs(**others, **{name: OTHER[name]}) != layer_configs(**others)

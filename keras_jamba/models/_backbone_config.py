"""The constructor arguments of `JambaBackbone`, and the layers built from them."""

import dataclasses
import math
from typing import Any

import keras

from keras_jamba.layers import AttentionLayer, FeedForward, GatedConvLayer, MambaLayer, MoELayer, Router
from keras_jamba.layers.quantization import QUANTIZATIONS
from keras_jamba.layers.router import router_from_config
from keras_jamba.models._pattern import block_pattern
from keras_jamba.ops import _checks


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """The constructor arguments of `JambaBackbone` without dtype and name; see there.

    Raises:
        ValueError: for a d_model, direction, balance_over or quantization out of range.
    """

    d_model: Any
    num_layers: Any
    mamba_ratio: Any
    attention_offset: Any
    moe_frequency: Any
    moe_offset: Any
    num_experts: Any
    num_experts_per_token: Any
    d_ff: Any
    use_swiglu: Any
    num_heads: Any
    num_kv_heads: Any
    use_rope: Any
    rope_theta: Any
    rope_interleaved: Any
    attention_window: Any
    attention_sinks: Any
    direction: Any
    mixer: Any
    d_state: Any
    d_conv: Any
    expand: Any
    dt_rank: Any
    conv_bias: Any
    proj_bias: Any
    mixer_rms_norm: Any
    normalize_top_k: Any
    balance_loss: Any
    balance_coefficient: Any
    squared_z_loss: Any
    z_coefficient: Any
    capacity_factor: Any
    balance_over: Any
    router: Any
    dropout: Any
    drop_path: Any
    epsilon: Any
    quantization: Any
    gradient_checkpointing: Any

    def __post_init__(self):
        _checks.check_integer("d_model", self.d_model)
        _checks.check_choice("direction", self.direction, ("causal", "bidirectional"))
        _checks.check_choice("balance_over", self.balance_over, ("layer", "model"))
        _checks.check_choice("quantization", self.quantization, (None, *QUANTIZATIONS))
        if isinstance(self.router, Router):
            object.__setattr__(self, "router", keras.saving.serialize_keras_object(self.router))

    def arguments(self):
        """Returns `{name: value}` of all arguments."""
        return {name: getattr(self, name) for name in BACKBONE_ARGUMENTS}

    @property
    def block_pattern(self):
        """A tuple of `(mixer, feed_forward)` per block."""
        return block_pattern(
            num_layers=self.num_layers,
            mamba_ratio=self.mamba_ratio,
            attention_offset=self.attention_offset,
            moe_frequency=self.moe_frequency,
            moe_offset=self.moe_offset,
            mixer=self.mixer,
            d_ff=self.d_ff,
        )

    @property
    def residual_gain(self):
        """The factor on the initial weights of the last projection of each residual branch."""
        return (2 * self.num_layers) ** -0.5

    def mixer_layer(self, kind, dtype):
        """Returns a new mixer; `kind` is "mamba", "gated_conv" or "attention"."""
        given = dict(d_model=self.d_model, residual_gain=self.residual_gain, dtype=dtype, name="mixer")
        causal = self.direction == "causal"
        if kind == "attention":
            return AttentionLayer(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                use_rope=self.use_rope,
                rope_theta=self.rope_theta,
                rope_interleaved=self.rope_interleaved,
                causal=causal,
                attention_window=self.attention_window,
                attention_sinks=self.attention_sinks,
                **given,
            )
        given |= dict(
            d_conv=self.d_conv,
            expand=self.expand,
            conv_bias=self.conv_bias,
            proj_bias=self.proj_bias,
            bidirectional=not causal,
        )
        if kind == "gated_conv":
            return GatedConvLayer(**given)
        return MambaLayer(
            d_state=self.d_state,
            dt_rank=self.dt_rank,
            mixer_rms_norm=self.mixer_rms_norm,
            epsilon=self.epsilon,
            **given,
        )

    def feed_forward_layer(self, kind, dtype):
        """Returns a new feed-forward layer, or None; `kind` is "dense", "moe" or None."""
        if kind is None:
            return None
        given = dict(
            d_model=self.d_model,
            d_ff=self.d_ff,
            use_swiglu=self.use_swiglu,
            residual_gain=self.residual_gain,
            dtype=dtype,
            name="feed_forward",
        )
        if kind == "dense":
            return FeedForward(**given)
        router = self.router
        if isinstance(router, dict):
            # Each layer gets its own router weights.
            router = router_from_config(router)
        layer = MoELayer(
            num_experts=self.num_experts,
            num_experts_per_token=self.num_experts_per_token,
            normalize_top_k=self.normalize_top_k,
            balance_loss=self.balance_loss,
            balance_coefficient=self.balance_coefficient,
            squared_z_loss=self.squared_z_loss,
            z_coefficient=self.z_coefficient,
            capacity_factor=self.capacity_factor,
            router=router,
            **given,
        )
        layer.router.adds_loss = self.balance_over == "layer"
        return layer


BACKBONE_ARGUMENTS = tuple(field.name for field in dataclasses.fields(BackboneConfig))


def check_sizes(arguments, count, source):
    """Raises ValueError if a model with these constructor arguments has more than `count` weights.

    The check compares lower bounds and builds no model. `source` names the origin of the arguments.
    """
    d, layers = arguments.get("d_model"), arguments.get("num_layers")
    width = 4 * d if arguments.get("d_ff") is None and type(d) is int else arguments.get("d_ff")
    sizes = {name: arguments.get(name) for name in ("vocab_size", "num_classes")}
    # Every block has at least one matrix of d_model x d_model, and one of d_model x d_ff.
    products = {"num_layers * d_model * d_model": (layers, d, d), "num_layers * d_model * d_ff": (layers, d, width)}
    products |= {f"{name} * d_model": (size, d) for name, size in sizes.items()}
    if arguments.get("router") is None and _has_experts(
        layers, arguments.get("moe_frequency"), arguments.get("moe_offset")
    ):
        products["num_experts * d_model * d_ff"] = (arguments.get("num_experts"), d, width)
    if arguments.get("mamba_ratio") != 0 and layers != 1:
        # At least one block has no attention.
        recurrent = ("expand", "d_conv", *(("d_state", "dt_rank") if arguments.get("mixer") == "mamba" else ()))
        products |= {f"{name} * d_model": (arguments.get(name), d) for name in recurrent}
    if arguments.get("stem") == "patchify":
        side = arguments.get("downsample")
        products["downsample * downsample * d_model"] = (side, side, d)
    if arguments.get("stem") == "residual":
        # Each block of the last stage has two 3x3 convolutions of d_model channels.
        products["stem_blocks * 18 * d_model * d_model"] = (arguments.get("stem_blocks"), 18, d, d)
    for name, factors in products.items():
        # The constructor refuses values of other types.
        if all(type(factor) is int for factor in factors) and math.prod(factors) > count:
            raise ValueError(
                f"The sizes of a model must fit its stored weights. Received: {source!r} with {count:,} weights, and "
                f"{name} = {math.prod(factors):,}. Drop the overrides that change the sizes, pass load_weights=False "
                "to start from random weights, or copy the files again."
            )


def _has_experts(layers, period, offset):
    """Returns whether a layer has experts, as in `block_pattern`. False for values that the constructor refuses."""
    if not (type(layers) is int and type(period) is int and period > 0):
        return False
    offset = period - 1 if offset is None else offset
    return type(offset) is int and offset < layers

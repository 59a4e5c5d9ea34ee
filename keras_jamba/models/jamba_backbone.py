"""The Jamba backbone: features in, features out."""

from collections.abc import Sequence
from typing import Literal

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Config, DType, Tensor, Tensors
from keras_jamba.layers import AttentionLayer, JambaBlock, MoELayer, Router
from keras_jamba.layers._checkpointing import checkpointed
from keras_jamba.layers._masks import mask_of, with_mask
from keras_jamba.layers._norm import RMSNorm
from keras_jamba.layers._requested import append_requested, split_requested
from keras_jamba.layers.quantization import quantize
from keras_jamba.models._aux_loss import shared_aux_loss
from keras_jamba.models._backbone_config import BackboneConfig
from keras_jamba.models._cached_model import CachedModel
from keras_jamba.models._routing_metrics import expert_layers
from keras_jamba.ops import _checks
from keras_jamba.ops._sharding import between_blocks


@keras.saving.register_keras_serializable(package="keras_jamba")
class JambaBackbone(CachedModel, keras.Model):
    """A stack of Mamba and attention blocks with dense or mixture-of-experts feed-forward layers.

    With the defaults, layers 0 to 6 are Mamba and layer 7 is attention, layers 1, 3, 5 and 7 have experts, and so on;
    see `backbone.block_pattern`. Maps `(b, t, d_model)` to the same shape, for any number of tokens t, and ends with an
    RMSNorm.

    Without a `capacity_factor`, chunking, padding and packing never change a document's outputs or states. Use
    `backbone(more, initial_state=state, return_state=True)` to train on chunks, and `backbone.step(more, cache)` to run
    on a cache of fixed capacity.

    Args:
        d_model: width d.
        num_layers: number of blocks.
        mamba_ratio: Mamba layers per attention layer; 0 is all attention, None no attention.
        attention_offset: index of the attention layer in its period of `mamba_ratio + 1`; None is last.
        moe_frequency: one layer per moe_frequency layers has experts; 0 is none.
        moe_offset: index of the expert layer in that period; None is last.
        num_experts, num_experts_per_token: see `MoELayer`.
        d_ff: hidden width of feed-forward layers and experts; None is `4 * d_model`. 0 omits the feed-forward layers,
            as Mamba-1 does.
        use_swiglu: see `FeedForward`.
        num_heads: query heads; divides d_model.
        num_kv_heads: key-value heads; None is num_heads.
        use_rope, rope_theta, rope_interleaved: see `AttentionLayer`.
        d_state, d_conv, expand, dt_rank, conv_bias, proj_bias, mixer_rms_norm: see `MambaLayer`.
        normalize_top_k, balance_loss, balance_coefficient, squared_z_loss, z_coefficient, capacity_factor: see
            `MoELayer`.
        balance_over: "layer", each expert layer adds its auxiliary loss; or "model", one auxiliary loss over the tokens
            of all expert layers, as in the training of Jamba.
        router: a `Router` with another policy, its serialized form, or None. Each expert layer gets a copy with its own
            weights. It replaces num_experts, num_experts_per_token and the other routing arguments.
        attention_window: see `AttentionLayer`. With a window, a cache of constant size serves any number of tokens.
        attention_sinks: number of first tokens per document that the window does not hide; 0 without a window.
        direction: "causal", each token sees the tokens before it; or "bidirectional", each token sees all tokens, for
            inputs without a time axis. Bidirectional Mamba layers scan both ways, attention has no causal mask, and
            the model has no state to continue from.
        mixer: "mamba"; or "gated_conv", `GatedConvLayer` in place of `MambaLayer`, to measure the effect of the state
            space.
        dropout, drop_path: see `JambaBlock`.
        epsilon: epsilon of all norms.
        quantization: None, or the mode in which weights are stored from the beginning: "int8", "int4" or
            "experts_int8", see `keras_jamba.layers.quantize`. Weights are zeros until they are loaded; to round random
            weights, call `quantize` instead.
        gradient_checkpointing: whether training keeps only the input of each block, and recomputes the block for the
            gradient. This takes less memory and more time for the same numbers. Eager TensorFlow keeps everything.

    Call arguments:
        features: `(b, t, d)`.
        padding_mask: `(b, t)` bool or None; False for padding, which no other token sees. A Keras mask, for example of
            `Embedding(mask_zero=True)`, has the same effect.
        segment_ids: `(b, t)` integers or None: the document of each token. Each change of the id begins a document, so
            0 1 0 are three documents. No document sees another.
        reset_mask: `(b, t)` bool or None: True where a sequence begins. That token begins a document, whatever its id,
            and ignores the initial state. At padding, the next real token does so.
        initial_state: the state of an earlier call or of `init_cache`; None is the beginning.
        return_state: whether to also return the state `{"block_0": state of its mixer, ...}`: nested dicts of tensors,
            which `MambaLayer` and `AttentionLayer` describe.
        return_routing: whether to also return the routing `{"block_1": routing as MoELayer returns it, ...}` of blocks
            with experts; it follows the state, if both are requested.
        training: whether to apply dropout.

    Raises:
        ValueError: for arguments that are out of range or do not fit together.

    Example:
        >>> import keras, keras_jamba
        >>> backbone = keras_jamba.models.JambaBackbone(d_model=64, num_layers=4, mamba_ratio=3)
        >>> backbone(keras.random.normal((2, 100, 64))).shape
        (2, 100, 64)

    Reference:
        [Lieber et al. (2024)](https://arxiv.org/abs/2403.19887).
    """

    @_checks.python_numbers
    def __init__(
        self,
        d_model: int = 256,
        num_layers: int = 8,
        mamba_ratio: int | None = 7,
        attention_offset: int | None = None,
        moe_frequency: int = 2,
        moe_offset: int | None = None,
        num_experts: int = 8,
        num_experts_per_token: int = 2,
        d_ff: int | None = None,
        use_swiglu: bool = True,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        use_rope: bool = True,
        rope_theta: float = 10000.0,
        rope_interleaved: bool = True,
        attention_window: int | None = None,
        attention_sinks: int = 0,
        direction: Literal["causal", "bidirectional"] = "causal",
        mixer: Literal["mamba", "gated_conv"] = "mamba",
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        proj_bias: bool = False,
        mixer_rms_norm: bool = True,
        normalize_top_k: bool = True,
        balance_loss: Literal["variance", "switch"] = "variance",
        balance_coefficient: float = 0.01,
        squared_z_loss: bool = True,
        z_coefficient: float = 0.001,
        capacity_factor: float | None = None,
        balance_over: Literal["layer", "model"] = "layer",
        router: Router | Config | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        epsilon: float = 1e-6,
        quantization: Literal["int8", "int4", "experts_int8"] | None = None,
        gradient_checkpointing: bool = False,
        dtype: DType | None = None,
        name: str | None = None,
    ) -> None:
        # Autocast would round the float32 states among the inputs.
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.supports_masking = True
        config = BackboneConfig(
            d_model=d_model,
            num_layers=num_layers,
            mamba_ratio=mamba_ratio,
            attention_offset=attention_offset,
            moe_frequency=moe_frequency,
            moe_offset=moe_offset,
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            d_ff=d_ff,
            use_swiglu=use_swiglu,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            use_rope=use_rope,
            rope_theta=rope_theta,
            rope_interleaved=rope_interleaved,
            attention_window=attention_window,
            attention_sinks=attention_sinks,
            direction=direction,
            mixer=mixer,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            conv_bias=conv_bias,
            proj_bias=proj_bias,
            mixer_rms_norm=mixer_rms_norm,
            normalize_top_k=normalize_top_k,
            balance_loss=balance_loss,
            balance_coefficient=balance_coefficient,
            squared_z_loss=squared_z_loss,
            z_coefficient=z_coefficient,
            capacity_factor=capacity_factor,
            balance_over=balance_over,
            dropout=dropout,
            drop_path=drop_path,
            epsilon=epsilon,
            quantization=quantization,
            gradient_checkpointing=gradient_checkpointing,
            router=router,
        )
        self._config, self.block_pattern = config.arguments(), config.block_pattern
        self.blocks = [
            JambaBlock(
                config.mixer_layer(mixer, self.dtype_policy),
                config.feed_forward_layer(feed_forward, self.dtype_policy),
                dropout,
                drop_path,
                epsilon,
                dtype=dtype,
                name=f"block_{i}",
            )
            for i, (mixer, feed_forward) in enumerate(self.block_pattern)
        ]
        self.final_norm = RMSNorm(epsilon=epsilon, dtype=dtype, name="final_norm")
        self.aux_loss: keras.Variable | None = None
        if balance_over == "model" and expert_layers(self):
            self.aux_loss = self.add_weight((), "zeros", dtype="float32", trainable=False, name="aux_loss")
        self._add_routing_metrics()
        if quantization is not None:
            quantize(self, quantization)
        self.build((None, None, d_model))

    def build(self, input_shape: Sequence[int | None]) -> None:
        _checks.check_last_axis("JambaBackbone", input_shape, self._config["d_model"])
        for layer in (*self.blocks, self.final_norm):
            if not layer.built:
                layer.build(input_shape)

    def call(
        self,
        features: Tensor,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        initial_state: dict[str, Tensors] | None = None,
        return_state: bool = False,
        return_routing: bool = False,
        training: bool | None = None,
    ) -> Tensors:
        _checks.check_last_axis("JambaBackbone", features.shape, self._config["d_model"])
        self._check_state(initial_state)
        mask = mask_of(features, padding_mask)
        given = dict(mask=mask, segment_ids=segment_ids, reset_mask=reset_mask, return_state=return_state)
        x, states, routings = between_blocks(features), {}, {}
        for name, block in self._named_blocks():
            state = None if initial_state is None else initial_state[name]
            routing = self._routing_of(block, return_routing)
            given |= dict(initial_state=state, return_routing=routing)
            if training and self._config["gradient_checkpointing"]:
                x = checkpointed(block, x, **given)
            else:
                x = block(x, **given, training=training)
            x, states[name], routings[name] = split_requested(x, return_state, routing)
            x = between_blocks(x)
        routings = {name: routing for name, routing in routings.items() if routing is not None}
        if self.aux_loss is not None and not _backend.compilation.is_exporting(features.shape):
            self._add_shared_aux_loss(routings, mask)
        # Some blocks and meshes drop the mask.
        x = with_mask(self.final_norm(x), mask)
        return append_requested(x, (return_state, states), (return_routing, routings))

    def _routing_of(self, block, return_routing):
        """Returns the argument `return_routing` of a block: False without experts."""
        if not isinstance(block.feed_forward, MoELayer):
            return False
        # The shared auxiliary loss needs only the decisions.
        return return_routing or (self.aux_loss is not None and "decisions")

    def _add_shared_aux_loss(self, routings, mask):
        aux_loss = shared_aux_loss(expert_layers(self)[0].router, list(routings.values()), mask)
        self.add_loss(aux_loss)
        self.aux_loss.assign(ops.stop_gradient(aux_loss))

    def block_outputs(
        self,
        features: Tensor,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensors]]:
        """Returns the outputs of each block and the routing.

        Args:
            features, padding_mask, segment_ids, reset_mask: see a call.

        Returns:
            A list of `(b, t, d)`, one per block, and the routing of a call with `return_routing`. The `final_norm` of
            the last entry is the model's output.
        """
        _checks.check_last_axis("JambaBackbone", features.shape, self._config["d_model"])
        given = dict(mask=mask_of(features, padding_mask), segment_ids=segment_ids, reset_mask=reset_mask)
        x, outputs, routings = between_blocks(features), [], {}
        for name, block in self._named_blocks():
            if isinstance(block.feed_forward, MoELayer):
                x, routings[name] = block(x, **given, return_routing=True)
            else:
                x = block(x, **given)
            outputs.append(x := between_blocks(x))
        return outputs, routings

    def attention_weights(self, features: Tensor) -> dict[str, Tensor]:
        """Returns the attention weights of each block with attention.

        Args:
            features: `(b, t, d)`.

        Returns:
            `{"block_7": (b, h, t, t) float32, ...}`, the `AttentionLayer.attention_weights` of each layer on its inputs
            in a call; empty without attention.
        """
        inputs = [features, *self.block_outputs(features)[0]]
        return {
            name: block.mixer.attention_weights(block.mixer_norm(x))
            for (name, block), x in zip(self._named_blocks(), inputs, strict=False)
            if isinstance(block.mixer, AttentionLayer)
        }

    def compute_output_spec(
        self,
        features: Tensor,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        initial_state: dict[str, Tensors] | None = None,
        return_state: bool = False,
        return_routing: bool = False,
        training: bool | None = None,
    ) -> Tensors:
        outputs = keras.KerasTensor(features.shape, self.final_norm.compute_dtype)
        states, routings = {}, {}
        for name, block in self._named_blocks():
            if return_state:
                states[name] = block.compute_output_spec(features, return_state=True)[1]
            if return_routing and isinstance(block.feed_forward, MoELayer):
                routings[name] = block.compute_output_spec(features, return_routing=True)[1]
        return append_requested(outputs, (return_state, states), (return_routing, routings))

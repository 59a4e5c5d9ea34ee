"""The mixture-of-experts part of a block."""

from collections.abc import Sequence
from typing import Any, Literal, Self

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Config, Tensor, Tensors
from keras_jamba.layers import _initializers
from keras_jamba.layers._decay import with_decay
from keras_jamba.layers._lora_weights import LoraWeights
from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._quantizable import QuantizableWeights, float_policy
from keras_jamba.layers._requested import append_requested
from keras_jamba.layers._sublayer_quantization import SublayerQuantizationConfig
from keras_jamba.layers.router import Router, router_from_config
from keras_jamba.ops import _checks, expert_mlp, expert_share, routing_statistics
from keras_jamba.ops._sharding import check_divisible
from keras_jamba.ops._tokens import zero_padding
from keras_jamba.ops.routing import drop_rate

_DECISIONS = ("logits", "probabilities", "weights", "indices")


@keras.saving.register_keras_serializable(package="keras_jamba")
class MoELayer(SublayerQuantizationConfig, LoraWeights, QuantizableWeights, keras.layers.Layer):
    """Mixture of experts: each output is the weighted sum over the k experts that a router chooses per token.

    Only the chosen experts contribute. The layer drops no token unless `capacity_factor` is set. `Router` describes
    the auxiliary loss. The layer holds three statistics of the last call. `usage`, `(x,)`, is each expert's share of
    the assignments. `drop_rate` is the share of assignments beyond the capacity. `aux_loss` is the auxiliary loss.

    Args:
        d_model: width of input and output.
        num_experts, num_experts_per_token, normalize_top_k: see `Router`; ignored with a `router`.
        balance_loss, balance_coefficient, squared_z_loss, z_coefficient: see `Router`; ignored with a `router`.
        d_ff: hidden width of an expert; None means `4 * d_model`.
        use_swiglu: whether experts are SwiGLU or perceptrons with GELU; see `FeedForward`.
        capacity_factor: capacity of an expert in tokens, as a multiple of an even share of the assignments in a call;
            None means no limit. First choices have priority over second choices, and earlier tokens over later
            tokens. The sum omits assignments beyond the capacity. All rows of a call share the capacity, which
            padding raises, so that a token's output depends on the other tokens, later tokens included.
        residual_gain: factor on the initial weights of the last projection. A model with n skip connections passes
            `n**-0.5`, so that its initial outputs are as large as a shallow model's (Radford et al. 2019, section
            2.3).
        router: a `Router` with another policy, or None.

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, the Keras mask. Losses and statistics ignore tokens where it is False, and such
            tokens use no capacity. In losses, tokens whose router logits are not finite have equal logits.
        return_routing: whether to also return the routing; "decisions" omits its statistics.
        record: whether to add the auxiliary loss and update the three statistics. Without it a call assigns no
            variable, so that `jax.jit`, for example, can compile it.
        training: passed to the router.

    Returns:
        `(b, t, d)`, or that and the routing, a dict: `"logits"` and `"probabilities"` `(b, t, x)` float32; `"weights"`
        `(b, t, k)` float32 and `"indices"` `(b, t, k)` int32 of the chosen experts; and the statistics of
        `ops.routing_statistics`.

    Raises:
        ValueError: if an argument is out of range or the input has another width.

    Reference:
        [Shazeer et al. (2017)](https://arxiv.org/abs/1701.06538); capacity:
        [Lepikhin et al. (2020)](https://arxiv.org/abs/2006.16668).
    """

    MATRICES: tuple[str, ...] = ("gate_bank", "up_bank", "down_bank")
    PLAIN: tuple[str, ...] = (*MATRICES, "usage", "drop_rate")
    KIND = "bank"

    @_checks.python_numbers
    def __init__(
        self,
        d_model: int,
        num_experts: int = 8,
        num_experts_per_token: int = 2,
        d_ff: int | None = None,
        use_swiglu: bool = True,
        normalize_top_k: bool = True,
        balance_loss: Literal["variance", "switch"] = "variance",
        balance_coefficient: float = 0.01,
        squared_z_loss: bool = True,
        z_coefficient: float = 0.001,
        capacity_factor: float | None = None,
        residual_gain: float = 1.0,
        router: Router | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.d_model, self.d_ff = d_model, 4 * d_model if d_ff is None else d_ff
        for name in ("d_model", "d_ff"):
            _checks.check_integer(name, getattr(self, name))
        if capacity_factor is not None:
            _checks.check_number("capacity_factor", capacity_factor, low=1e-3)
        _checks.check_number("residual_gain", residual_gain, low=0)
        if not isinstance(router, Router | None):
            raise ValueError(
                f"router must be a keras_jamba.layers.Router or None. Received: router={router!r}. Subclass Router."
            )
        self.router = router or Router(
            num_experts,
            num_experts_per_token,
            normalize_top_k,
            balance_loss,
            balance_coefficient,
            squared_z_loss,
            z_coefficient,
            name="router",
            dtype=float_policy(self),
        )
        self.num_experts, self.use_swiglu = self.router.num_experts, use_swiglu
        self.capacity_factor, self.residual_gain = capacity_factor, residual_gain

    def build(self, input_shape: Sequence[int | None]) -> None:
        _checks.check_last_axis("MoELayer", input_shape, self.d_model)
        check_divisible(self.d_model, {"num_experts": self.num_experts})
        d, f = self.d_model, self.d_ff
        if not self.router.built:
            self.router.build((None, d))
        if self.use_swiglu:
            self._add_bank("gate_bank", d, f)
        self._add_bank("up_bank", d, f)
        self._add_bank("down_bank", f, d, self.residual_gain)
        self.usage = self._statistic("usage", (self.num_experts,), 1.0 / self.num_experts)
        self.drop_rate = self._statistic("drop_rate", (), 0.0)
        self.built = True
        self._add_configured_adapters()

    @property
    def aux_loss(self) -> Tensor:
        return self.router.aux_loss

    def _add_bank(self, name, fan_in, fan_out, gain=1.0):
        # Glorot's bound of one expert. Keras' initializer would count the expert axis as a receptive field.
        bound = gain * (6.0 / (fan_in + fan_out)) ** 0.5
        shape = (self.num_experts, fan_in, fan_out)
        self._add_matrix(name, shape, initializer=_initializers.uniform(bound))
        with_decay(getattr(self, name))

    def _statistic(self, name, shape, value):
        start = keras.initializers.Constant(value)
        return self.add_weight(shape, start, name=name, dtype="float32", trainable=False, autocast=False)

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        return_routing: bool | Literal["decisions"] = False,
        record: bool = True,
        training: bool | None = None,
    ) -> Tensors:
        _checks.check_last_axis("MoELayer", inputs.shape, self.d_model)
        shape = ops.shape(inputs)
        mask, _ = _checks.check_tokens(mask_of(inputs, mask), None, inputs.shape)
        inputs = zero_padding(inputs, mask)
        mask = None if mask is None else ops.reshape(mask, (-1,))
        tokens = ops.reshape(inputs, (-1, self.d_model))

        # An exported graph has no variables to assign.
        record = record and not _backend.compilation.is_exporting(inputs.shape)
        routing = (self.router if record else self.router.route)(tokens, mask=mask, training=training)
        outputs, kept = self._weighted_experts(tokens, routing, mask)
        outputs = ops.reshape(outputs, shape)

        if record:
            self._record_statistics(routing, mask, kept)
        returned = self._returned_routing(routing, mask, kept, shape, return_routing) if return_routing else None
        return append_requested(outputs, (return_routing, returned))

    def _weighted_experts(self, tokens, routing, mask):
        """Returns the outputs `(s, d)`, and with a capacity the `(s, k)` assignments within it, or None."""
        given = {name: self._matrix(name) for name in self.matrices()}
        given |= {name: routing[name] for name in ("weights", "indices")}
        if self.capacity_factor is None:
            return expert_mlp(tokens, **given), None
        return expert_mlp(tokens, **given, capacity_factor=self.capacity_factor, mask=mask)

    def _record_statistics(self, routing, mask, kept):
        self.usage.assign(ops.stop_gradient(expert_share(routing["indices"], self.num_experts, mask)))
        if kept is not None:
            self.drop_rate.assign(drop_rate(kept, mask))

    def _returned_routing(self, routing, mask, kept, shape, return_routing):
        """Returns the routing of tokens `(s, ...)` in the shape of the inputs, `(b, t, ...)`."""
        decisions = {name: ops.reshape(routing[name], (*shape[:-1], routing[name].shape[-1])) for name in _DECISIONS}
        if return_routing == "decisions":
            return decisions
        return decisions | routing_statistics(routing["indices"], self.num_experts, mask, kept)

    def compute_output_spec(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        return_routing: bool | Literal["decisions"] = False,
        record: bool = True,
        training: bool | None = None,
    ) -> Tensors:
        _checks.check_last_axis("MoELayer", inputs.shape, self.d_model)
        outputs = keras.KerasTensor(inputs.shape, self.compute_dtype)
        if not return_routing:
            return outputs
        spec = lambda shape, dtype="float32": keras.KerasTensor(shape, dtype)  # noqa: E731
        chosen = (*inputs.shape[:-1], self.router.num_experts_per_token)
        decisions = {
            "logits": spec((*inputs.shape[:-1], self.num_experts)),
            "probabilities": spec((*inputs.shape[:-1], self.num_experts)),
            "weights": spec(chosen),
            "indices": spec(chosen, "int32"),
        }
        if return_routing == "decisions":
            return outputs, decisions
        statistics = {name: spec(()) for name in ("entropy", "max_load", "drop_rate")}
        return outputs, decisions | {"expert_share": spec((self.num_experts,))} | statistics

    def get_config(self) -> Config:
        ours = {
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "use_swiglu": self.use_swiglu,
            "capacity_factor": self.capacity_factor,
            "residual_gain": self.residual_gain,
        }
        if type(self.router) is Router:
            return super().get_config() | ours | self.router.options()
        return super().get_config() | ours | {"router": keras.saving.serialize_keras_object(self.router)}

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return super().from_config(config | {"router": router_from_config(config.get("router"))})

"""The mixture-of-experts part of a block."""

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.layers._decay import with_decay
from keras_jamba.layers._lora_weights import LoraWeights
from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._quantizable import QuantizableWeights, float_policy
from keras_jamba.layers._sublayer_quantization import SublayerQuantizationConfig
from keras_jamba.layers.router import Router
from keras_jamba.ops import _checks, expert_mlp, expert_share, routing_statistics
from keras_jamba.ops._sharding import check_parts
from keras_jamba.ops.routing import drop_rate

_DECIDED = ("logits", "probabilities", "weights", "indices")


@keras.saving.register_keras_serializable(package="keras_jamba")
class MoELayer(SublayerQuantizationConfig, LoraWeights, QuantizableWeights, keras.layers.Layer):
    """Every token goes through the k experts that a router chooses for it; their outputs are weighted and summed.

    Only the chosen experts are computed, and no token is dropped unless `capacity_factor` is set. `Router`
    says what is added to the losses. Three statistics of the last call can be read off the layer: `usage`,
    the share of assignments each expert was given, `(x,)`, `drop_rate`, the share of them that found no
    room, and `aux_loss`, what was added to the losses.

    Args:
        d_model: width of input and output.
        num_experts, num_experts_per_token, normalize_top_k, balance_loss, balance_coefficient,
            squared_z_loss, z_coefficient: see `Router`; without effect where `router` is given.
        d_ff: hidden width of an expert; None is `4 * d_model`.
        use_swiglu: SwiGLU experts, or perceptrons with GELU; see `FeedForward`.
        capacity_factor: None for as much room as is needed, or how many tokens an expert has room for,
            as a multiple of an even share of the assignments in a call. First choices come before second
            ones, earlier tokens before later ones; what finds no room is left out of the sum. The room is for
            all rows of a call together, padding counted: what a token gives then depends on the others of the
            call, later ones among them.
        residual_gain: a factor on the start of the last projection. A model of n skip connections passes
            `n**-0.5`, so that it starts no louder than a shallow one (Radford et al. 2019, section 2.3).
        router: a `Router` for another policy, or None.

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, Keras' own. Tokens where it is False count neither in the losses nor in
            the statistics, and take no expert's room.
        return_routing: whether to return what was decided too; "decisions" leaves out the statistics.
        record: whether the auxiliary loss is added and the three statistics are kept. Where not, nothing is
            assigned: such a call can be compiled by itself, with `jax.jit` for example.
        training: for the router.

    Returns:
        `(b, t, d)`; or that and a dict: `"logits"` and `"probabilities"` `(b, t, x)` float32, `"weights"` `(b, t, k)`
        float32 and `"indices"` `(b, t, k)` int32 of the chosen experts; and the statistics of `ops.routing_statistics`.

    Raises:
        ValueError: for arguments out of range or an input of another width.

    Reference:
        [Shazeer et al. (2017)](https://arxiv.org/abs/1701.06538); capacity:
        [Lepikhin et al. (2020)](https://arxiv.org/abs/2006.16668).
    """

    MATRICES = ("gate_bank", "up_bank", "down_bank")
    PLAIN = (*MATRICES, "usage", "drop_rate")
    KIND = "bank"

    @_checks.python_numbers
    def __init__(
        self,
        d_model,
        num_experts=8,
        num_experts_per_token=2,
        d_ff=None,
        use_swiglu=True,
        normalize_top_k=True,
        balance_loss="variance",
        balance_coefficient=0.01,
        squared_z_loss=True,
        z_coefficient=0.001,
        capacity_factor=None,
        residual_gain=1.0,
        router=None,
        **kwargs,
    ):
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

    def build(self, input_shape):
        _checks.check_last_axis("MoELayer", input_shape, self.d_model)
        check_parts(self.d_model, {"num_experts": self.num_experts})
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
    def aux_loss(self):
        return self.router.aux_loss

    def _add_bank(self, name, fan_in, fan_out, gain=1.0):
        # Glorot's bound of one expert: the initializer would take the experts for a receptive field.
        bound = gain * (6.0 / (fan_in + fan_out)) ** 0.5
        shape = (self.num_experts, fan_in, fan_out)
        self._add_matrix(name, shape, initializer=_initializers.uniform(bound))
        with_decay(getattr(self, name))

    def _statistic(self, name, shape, value):
        start = keras.initializers.Constant(value)
        return self.add_weight(shape, start, name=name, dtype="float32", trainable=False, autocast=False)

    def call(self, inputs, mask=None, return_routing=False, record=True, training=None):
        _checks.check_last_axis("MoELayer", inputs.shape, self.d_model)
        shape = ops.shape(inputs)
        mask, _ = _checks.check_tokens(mask_of(inputs, mask), None, inputs.shape)
        mask = None if mask is None else ops.reshape(mask, (-1,))
        tokens = ops.reshape(inputs, (-1, self.d_model))
        routing = (self.router if record else self.router.route)(tokens, mask=mask, training=training)
        outputs, kept = self._experts(tokens, routing, mask)
        outputs = ops.reshape(outputs, shape)
        if record:
            self.usage.assign(ops.stop_gradient(expert_share(routing["indices"], self.num_experts, mask)))
            if kept is not None:
                self.drop_rate.assign(drop_rate(kept, mask))
        if not return_routing:
            return outputs
        decisions = {name: ops.reshape(routing[name], (*shape[:-1], routing[name].shape[-1])) for name in _DECIDED}
        if return_routing != "decisions":
            decisions |= routing_statistics(routing["indices"], self.num_experts, mask, kept)
        return outputs, decisions

    def _experts(self, tokens, routing, mask):
        given = {name: self._matrix(name) for name in self.matrices()}
        given |= {name: routing[name] for name in ("weights", "indices")}
        if self.capacity_factor is None:
            return expert_mlp(tokens, **given), None
        return expert_mlp(tokens, **given, capacity_factor=self.capacity_factor, mask=mask)

    def compute_output_spec(self, inputs, mask=None, return_routing=False, record=True, training=None):
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

    def get_config(self):
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
    def from_config(cls, config):
        router = config.get("router")
        return super().from_config(config | {"router": router and keras.saving.deserialize_keras_object(router)})

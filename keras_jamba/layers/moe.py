"""The mixture-of-experts part of a block."""

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.layers._masks import mask_of
from keras_jamba.ops import (
    _checks,
    expert_mlp,
    expert_share,
    router_z_loss,
    switch_balance_loss,
    top_k_routing,
    variance_balance_loss,
)

BALANCE_LOSSES = ("variance", "switch")


@keras.saving.register_keras_serializable(package="keras_jamba")
class MoELayer(keras.layers.Layer):
    """Every token goes through the k experts that a router chooses for it; their outputs are weighted and summed.

    Routing is float32 under every dtype policy. At each call, in training and evaluation alike,
    `balance_coefficient * balance + z_coefficient * z` is added to the losses, so `loss` and
    `val_loss` are the same quantity; and two statistics of that call can be read off the layer:
    `usage`, the share of assignments each expert got, `(x,)`, and `aux_loss`, what was added.

    Args:
        d_model: width of input and output.
        num_experts: experts x.
        num_experts_per_token: experts k that a token goes through, at most num_experts.
        d_ff: hidden width of an expert; None is `4 * d_model`.
        use_swiglu: SwiGLU experts, or perceptrons with GELU; see `FeedForward`.
        normalize_top_k: whether the k weights of a token sum to 1. Jamba's checkpoints: no.
        balance_loss: "variance", `sum((usage - 1/x)^2)` of the mean probabilities (the architecture
            document's), or "switch" (Fedus et al.).
        balance_coefficient: its weight, the document's alpha.
        squared_z_loss: whether the z-loss is squared; the document's literal form is not, and has no
            lower bound.
        z_coefficient: its weight, the document's beta.
        residual_gain: a factor on the start of the last projection. A model of n skip connections passes
            `n**-0.5`, so that it starts no louder than a shallow one (Radford et al. 2019, section 2.3).

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, Keras' own. Tokens where it is False count neither in the losses nor in
            the statistics.
        return_router_logits: whether to return the logits too.

    Returns:
        `(b, t, d)`, or that and the router's logits `(b, t, x)`, float32.

    Raises:
        ValueError: for arguments out of range or an input of another width.

    Reference:
        [Shazeer et al. (2017)](https://arxiv.org/abs/1701.06538),
        [Fedus et al. (2021)](https://arxiv.org/abs/2101.03961),
        [Zoph et al. (2022)](https://arxiv.org/abs/2202.08906).
    """

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
        residual_gain=1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        d_ff = 4 * d_model if d_ff is None else d_ff
        sizes = dict(
            d_model=d_model,
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            d_ff=d_ff,
        )
        for name, value in sizes.items():
            _checks.check_integer(name, value)
        if num_experts_per_token > num_experts:
            raise ValueError(
                "num_experts_per_token must be at most num_experts. Received: num_experts_per_token="
                f"{num_experts_per_token}, num_experts={num_experts}. Lower the first or raise the second."
            )
        _checks.check_choice("balance_loss", balance_loss, BALANCE_LOSSES)
        _checks.check_number("balance_coefficient", balance_coefficient, low=0)
        _checks.check_number("z_coefficient", z_coefficient, low=0)
        _checks.check_number("residual_gain", residual_gain, low=0)
        self.d_model, self.d_ff, self.use_swiglu = d_model, d_ff, use_swiglu
        self.num_experts, self.num_experts_per_token = num_experts, num_experts_per_token
        self.normalize_top_k, self.balance_loss = normalize_top_k, balance_loss
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient
        self.squared_z_loss, self.residual_gain = squared_z_loss, residual_gain

    def build(self, input_shape):
        _checks.check_last_axis("MoELayer", input_shape, self.d_model)
        x, d, f = self.num_experts, self.d_model, self.d_ff
        self.router_kernel = self.add_weight((d, x), _initializers.xavier(), name="router_kernel", autocast=False)
        if self.use_swiglu:
            self.gate_bank = self._bank("gate_bank", d, f)
        self.up_bank = self._bank("up_bank", d, f)
        self.down_bank = self._bank("down_bank", f, d, self.residual_gain)
        self.usage = self._statistic("usage", (x,), 1.0 / x)
        self.aux_loss = self._statistic("aux_loss", (), 0.0)

    def _bank(self, name, fan_in, fan_out, gain=1.0):
        # Glorot's bound of one expert: the initializer would take the experts for a receptive field.
        bound = gain * (6.0 / (fan_in + fan_out)) ** 0.5
        shape = (self.num_experts, fan_in, fan_out)
        return self.add_weight(shape, _initializers.uniform(bound), name=name)

    def _statistic(self, name, shape, value):
        return self.add_weight(shape, keras.initializers.Constant(value), name=name, trainable=False, autocast=False)

    def call(self, inputs, mask=None, return_router_logits=False):
        mask = mask_of(inputs, mask)
        mask, _ = _checks.check_tokens(mask, None, inputs.shape)
        shape = ops.shape(inputs)
        tokens = ops.reshape(inputs, (-1, self.d_model))
        logits = ops.matmul(ops.cast(tokens, "float32"), ops.cast(self.router_kernel, "float32"))
        weights, indices, probabilities = top_k_routing(logits, self.num_experts_per_token, self.normalize_top_k)
        self._report(logits, indices, probabilities, None if mask is None else ops.reshape(mask, (-1,)))
        gate_bank = self.gate_bank if self.use_swiglu else None
        outputs = expert_mlp(tokens, weights, indices, self.up_bank, self.down_bank, gate_bank)
        outputs = ops.reshape(outputs, shape)
        if return_router_logits:
            return outputs, ops.reshape(logits, (*shape[:-1], self.num_experts))
        return outputs

    def _report(self, logits, indices, probabilities, mask):
        if self.balance_loss == "variance":
            balance = variance_balance_loss(probabilities, mask)
        else:
            balance = switch_balance_loss(probabilities, indices, mask)
        z = router_z_loss(logits, self.squared_z_loss, mask)
        aux_loss = self.balance_coefficient * balance + self.z_coefficient * z
        self.add_loss(aux_loss)
        self.aux_loss.assign(ops.stop_gradient(aux_loss))
        self.usage.assign(ops.stop_gradient(expert_share(indices, self.num_experts, mask)))

    def compute_output_spec(self, inputs, mask=None, return_router_logits=False):
        _checks.check_last_axis("MoELayer", inputs.shape, self.d_model)
        outputs = keras.KerasTensor(inputs.shape, self.compute_dtype)
        if return_router_logits:
            return outputs, keras.KerasTensor((*inputs.shape[:-1], self.num_experts), "float32")
        return outputs

    def get_config(self):
        return super().get_config() | {
            "d_model": self.d_model,
            "num_experts": self.num_experts,
            "num_experts_per_token": self.num_experts_per_token,
            "d_ff": self.d_ff,
            "use_swiglu": self.use_swiglu,
            "normalize_top_k": self.normalize_top_k,
            "balance_loss": self.balance_loss,
            "balance_coefficient": self.balance_coefficient,
            "squared_z_loss": self.squared_z_loss,
            "z_coefficient": self.z_coefficient,
            "residual_gain": self.residual_gain,
        }

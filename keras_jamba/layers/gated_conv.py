"""The gated convolution: the Mamba mixer without its state space."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_jamba._typing import Config, Tensor, Tensors
from keras_jamba.layers import _initializers, states
from keras_jamba.layers._projection import Projection
from keras_jamba.layers._recurrent_mixer import RecurrentMixer, checked_sequence
from keras_jamba.layers._requested import append_requested, split_requested
from keras_jamba.layers._short_convolution import ShortConvolution
from keras_jamba.ops import _checks
from keras_jamba.ops._sharding import by_channels, by_tokens, check_divisible


@keras.saving.register_keras_serializable(package="keras_jamba")
class GatedConvLayer(RecurrentMixer):
    """A gated causal convolution: `MambaLayer` without its state space, a baseline for the state space.

    Project to `x` and `z` of width `e = expand * d_model`; convolve x over time, SiLU; gate with SiLU(z); project
    back. In each layer, the output of a token depends on it and the `d_conv - 1` tokens before it.

    Args:
        d_model: width of input and output.
        d_conv: width w of the convolution, the current token included.
        expand: inner width as a multiple of d_model.
        conv_bias: whether the convolution has a bias.
        proj_bias: whether the input and output projections have a bias.
        bidirectional: whether to add the outputs of a second convolution, which runs from the last token to the first
            and has separate weights. A bidirectional layer has no state.
        residual_gain: see `MambaLayer`.

    Call arguments:
        inputs, mask, segment_ids, reset_mask, initial_state, return_state, return_rollback_state: see `MambaLayer`.

    Returns:
        `(b, t, d)`; with `return_state` also the state: `{"conv": (b, w - 1, e), "document": (b,)}`.

    Raises:
        ValueError: if an argument is out of range, the input has another width, or the state belongs to another layer,
            batch or dtype.

    Example:
        >>> import keras, keras_jamba
        >>> keras_jamba.layers.GatedConvLayer(64)(keras.random.normal((2, 10, 64))).shape
        (2, 10, 64)

    Reference:
        [Yu and Wang (2024)](https://arxiv.org/abs/2405.07992), who classify images with gated convolutions.
    """

    @_checks.python_numbers
    def __init__(
        self,
        d_model: int,
        d_conv: int = 4,
        expand: int = 2,
        conv_bias: bool = True,
        proj_bias: bool = False,
        bidirectional: bool = False,
        residual_gain: float = 1.0,
        **kwargs: Any,
    ) -> None:
        _checks.check_not_backwards(kwargs, "GatedConvLayer", "bidirectional=True")
        # Autocast would round the state to the compute dtype.
        super().__init__(autocast=False, **kwargs)
        for name, value in dict(d_model=d_model, d_conv=d_conv, expand=expand).items():
            _checks.check_integer(name, value)
        _checks.check_number("residual_gain", residual_gain, low=0)
        self.supports_masking = True
        self.d_model, self.d_conv, self.expand = d_model, d_conv, expand
        self.conv_bias, self.proj_bias = conv_bias, proj_bias
        self.bidirectional, self.residual_gain = bidirectional, residual_gain
        self.inner = expand * d_model
        given = dict(use_bias=proj_bias, dtype=self.dtype_policy)
        xavier = _initializers.xavier
        self.in_proj = Projection(2 * self.inner, kernel_initializer=xavier(), name="in_proj", **given)
        self.out_proj = Projection(d_model, kernel_initializer=xavier(0.5 * residual_gain), name="out_proj", **given)
        conv = dict(inner=self.inner, d_conv=d_conv, conv_bias=conv_bias, dtype=self.dtype_policy)
        self.conv = GatedConvolution(**conv, name="conv")
        self.backward_conv = GatedConvolution(**conv, name="backward_conv") if bidirectional else None

    def build(self, input_shape: Sequence[int | None]) -> None:
        _checks.check_last_axis("GatedConvLayer", input_shape, self.d_model)
        check_divisible(self.d_model, {"expand * d_model": self.inner})
        self.in_proj.build((None, None, self.d_model))
        self.out_proj.build((None, None, self.inner))
        for conv in (self.conv, self.backward_conv):
            if conv is not None:
                conv.build((None, None, self.inner))

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        initial_state: dict[str, Tensor] | None = None,
        return_state: bool = False,
        return_rollback_state: bool = False,
    ) -> Tensors:
        requested = dict(return_state=return_state, return_rollback_state=return_rollback_state)
        tokens = mask, segment_ids, reset_mask
        inputs, initial_state, tokens, sequence = checked_sequence(self, inputs, tokens, initial_state, **requested)
        given = dict(mask=sequence.mask, segment_ids=sequence.documents)

        # Constrains the layout of each half: otherwise XLA moves more data between devices.
        x, z = map(by_channels, ops.split(by_channels(self.in_proj(inputs)), 2, axis=-1))
        y = self.conv(x, z, **given, initial_state=sequence.initial, **requested)
        y, state, used = split_requested(y, *requested.values())
        if self.bidirectional:
            y = y + states.reversed_in_time(self.backward_conv, x, z, **given)
        outputs = self.out_proj(by_tokens(y))

        rollback_state = states.rollback_state_of(initial_state, *tokens, **used) if return_rollback_state else None
        state = sequence.final(state) if return_state else None
        return append_requested(outputs, (return_state, state), (return_rollback_state, rollback_state))

    @property
    def _forward_layer(self):
        return self.conv

    def get_config(self) -> Config:
        names = ("d_model", "expand", "proj_bias", "bidirectional", "residual_gain", "d_conv", "conv_bias")
        return super().get_config() | {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable(package="keras_jamba")
class GatedConvolution(ShortConvolution):
    """One direction of a `GatedConvLayer`: convolution, SiLU and gate.

    Args:
        inner: width e.
        d_conv, conv_bias: see `GatedConvLayer`.

    Call arguments:
        x, z: `(b, t, e)`, the input and the gate.
        mask, segment_ids: `(b, t)` or None.
        initial_state: `{"conv": (b, w - 1, e)}` or None.
        return_state: whether to return the final state.
        return_rollback_state: whether to return the inputs of `state_after`.

    Returns:
        `(b, t, e)`; with the flags also the final state and the inputs of `state_after`.
    """

    def call(
        self,
        x,
        z,
        mask=None,
        segment_ids=None,
        initial_state=None,
        return_state=False,
        return_rollback_state=False,
    ):
        state = None if initial_state is None else initial_state["conv"]
        convolved, state = self.convolve(x, state, mask, segment_ids, return_state)
        y = convolved * ops.silu(z)
        return append_requested(y, (return_state, {"conv": state}), (return_rollback_state, {"x": x}))

"""The Mamba mixer."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Config, Tensor, Tensors
from keras_jamba.layers import _initializers, states
from keras_jamba.layers._norm import RMSNorm
from keras_jamba.layers._projection import Projection
from keras_jamba.layers._recurrent_mixer import RecurrentMixer, checked_sequence
from keras_jamba.layers._requested import append_requested, split_requested
from keras_jamba.layers._short_convolution import ShortConvolution
from keras_jamba.ops import _checks, selective_scan
from keras_jamba.ops._sharding import by_channels, by_tokens, check_divisible
from keras_jamba.ops.scan import requested_scan


@keras.saving.register_keras_serializable(package="keras_jamba")
class MambaLayer(RecurrentMixer):
    """Mamba: a gated selective state space after a short causal convolution.

    As in docs/concepts/architecture.md: project to `x` and `z` of width `e = expand * d_model`; convolve x over
    time, SiLU; project x to the time step delta, B and C; scan; gate with SiLU(z); project back. Softplus, A and the
    scan are float32 under every dtype policy.

    Args:
        d_model: width of input and output.
        d_state: size n of the state of each channel.
        d_conv: width w of the convolution, the current token included.
        expand: inner width as a multiple of d_model.
        dt_rank: rank r of the projection to delta; None means `ceil(d_model / 16)`.
        conv_bias: whether the convolution has a bias.
        proj_bias: whether the input and output projections have a bias.
        mixer_rms_norm: whether to RMS-normalise B, C and the low-rank input of delta, as Jamba does and Mamba does not.
        dt_min, dt_max: range of the initial time steps `softplus(dt_bias)`, which are log-uniform.
        epsilon: number added to the mean square in the three norms.
        bidirectional: whether to add the outputs of a second convolution and state space, which run from the last token
            to the first and have separate weights. For inputs without a direction of time. A bidirectional layer has
            no state.
        residual_gain: factor on the initial weights of the last projection. A model with n skip connections passes
            `n**-0.5`, so that its initial outputs are as large as a shallow model's (Radford et al. 2019, section
            2.3).
        implementation: implementation of the scan; see `keras_jamba.ops.selective_scan`.

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, the Keras mask. Other tokens ignore tokens where it is False.
        segment_ids: `(b, t)` integers or None: the document id of each token. Every change of the id begins a new
            document: ids 0 1 0 are three documents. Documents do not affect each other.
        reset_mask: `(b, t)` bool or None: True where a new sequence begins. The token begins a document, whatever its
            id, and ignores the initial state. A reset at padding takes effect at the next real token.
        initial_state: state of an earlier call, or of `init_cache`; None means zeros.
        return_state: whether to also return the final state.
        return_rollback_state: whether to also return the input of `rollback`.

    Returns:
        `(b, t, d)`; unless bidirectional, the output of token t depends only on tokens up to t. With `return_state`
        also the state, a dict: `"conv"` `(b, w - 1, e)` in the compute dtype, the last inputs of the convolution;
        `"ssm"` `(b, e, n)` float32; and `"document"` `(b,)` int32, the id of the last document, or the least int32
        without an id. Gradients flow through the first two; `detach_state` stops them.

    Raises:
        ValueError: if an argument is out of range, the input has another width, or the state belongs to another layer,
            batch or dtype.

    Example:
        >>> import keras, keras_jamba
        >>> keras_jamba.layers.MambaLayer(64)(keras.random.normal((2, 10, 64))).shape
        (2, 10, 64)

    Reference:
        [Gu and Dao (2023)](https://arxiv.org/abs/2312.00752);
        the norms: [Lieber et al. (2024)](https://arxiv.org/abs/2403.19887);
        two directions: [Zhu et al. (2024)](https://arxiv.org/abs/2401.09417).
    """

    @_checks.python_numbers
    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        proj_bias: bool = False,
        mixer_rms_norm: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        epsilon: float = 1e-6,
        bidirectional: bool = False,
        residual_gain: float = 1.0,
        implementation: str | None = None,
        **kwargs: Any,
    ) -> None:
        _checks.check_not_backwards(kwargs, "MambaLayer", "bidirectional=True")
        # Autocast would round the float32 state to the compute dtype.
        super().__init__(autocast=False, **kwargs)
        for name, value in dict(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand).items():
            _checks.check_integer(name, value)
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        _checks.check_integer("dt_rank", dt_rank)
        _checks.check_number("dt_max", dt_max, low=1e-9)
        _checks.check_number("dt_min", dt_min, low=1e-9, high=dt_max)
        _checks.check_number("epsilon", epsilon, low=0)
        _checks.check_number("residual_gain", residual_gain, low=0)
        self.supports_masking = True
        self.d_model, self.expand, self.proj_bias = d_model, expand, proj_bias
        self.bidirectional, self.residual_gain = bidirectional, residual_gain
        self.inner = expand * d_model
        self._ssm_config = dict(
            d_state=d_state,
            d_conv=d_conv,
            dt_rank=dt_rank,
            conv_bias=conv_bias,
            mixer_rms_norm=mixer_rms_norm,
            dt_min=dt_min,
            dt_max=dt_max,
            epsilon=epsilon,
            implementation=implementation,
        )
        given = dict(use_bias=proj_bias, dtype=self.dtype_policy)
        xavier = _initializers.xavier
        self.in_proj = Projection(2 * self.inner, kernel_initializer=xavier(), name="in_proj", **given)
        self.out_proj = Projection(d_model, kernel_initializer=xavier(0.5 * residual_gain), name="out_proj", **given)
        ssm = dict(self._ssm_config, inner=self.inner, dtype=self.dtype_policy)
        self.ssm = SelectiveSSM(**ssm, name="ssm")
        self.backward_ssm = SelectiveSSM(**ssm, name="backward_ssm") if bidirectional else None

    def build(self, input_shape: Sequence[int | None]) -> None:
        _checks.check_last_axis("MambaLayer", input_shape, self.d_model)
        check_divisible(self.d_model, {"expand * d_model": self.inner})
        self.in_proj.build((None, None, self.d_model))
        self.out_proj.build((None, None, self.inner))
        for ssm in (self.ssm, self.backward_ssm):
            if ssm is not None:
                ssm.build((None, None, self.inner))

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
        y = self.ssm(x, z, **given, initial_state=sequence.initial, **requested)
        y, state, used = split_requested(y, *requested.values())
        if self.bidirectional:
            y = y + states.reversed_in_time(self.backward_ssm, x, z, **given)
        outputs = self.out_proj(by_tokens(y))

        rollback_state = states.rollback_state_of(initial_state, *tokens, **used) if return_rollback_state else None
        state = sequence.final(state) if return_state else None
        return append_requested(outputs, (return_state, state), (return_rollback_state, rollback_state))

    @property
    def _forward_layer(self):
        return self.ssm

    def get_config(self) -> Config:
        names = ("d_model", "expand", "proj_bias", "bidirectional", "residual_gain")
        return super().get_config() | {name: getattr(self, name) for name in names} | self._ssm_config


@keras.saving.register_keras_serializable(package="keras_jamba")
class SelectiveSSM(ShortConvolution):
    """One direction of a `MambaLayer`: convolution, SiLU, the projections to delta, B and C, and the gated scan.

    Args:
        inner: width e.
        d_state, d_conv, dt_rank, conv_bias, mixer_rms_norm, dt_min, dt_max, epsilon, implementation: see `MambaLayer`.

    Call arguments:
        x, z: `(b, t, e)`, the input and the gate.
        mask, segment_ids: `(b, t)` or None.
        initial_state: `{"conv": (b, w - 1, e), "ssm": (b, e, n)}` or None.
        return_state: whether to return the final state.
        return_rollback_state: whether to return the inputs of `state_after`.

    Returns:
        `(b, t, e)`; with the flags also the final state and the inputs of `state_after`.
    """

    rollback_names = ("x", "convolved", "delta", "B")

    def __init__(
        self,
        inner,
        d_state,
        d_conv,
        dt_rank,
        conv_bias,
        mixer_rms_norm,
        dt_min,
        dt_max,
        epsilon,
        implementation,
        **kwargs,
    ):
        super().__init__(inner, d_conv, conv_bias, **kwargs)
        self.d_state, self.dt_rank, self.mixer_rms_norm = d_state, dt_rank, mixer_rms_norm
        self.dt_min, self.dt_max, self.epsilon = dt_min, dt_max, epsilon
        self.implementation = implementation
        given = dict(dtype=self.dtype_policy)
        xavier, narrow = _initializers.xavier(), _initializers.uniform(dt_rank**-0.5)
        self.x_proj = Projection(dt_rank + 2 * d_state, kernel_initializer=xavier, name="x_proj", **given)
        # Not quantized: it is small, and its outputs are arguments of exponentials.
        self.dt_proj = Projection(inner, kernel_initializer=narrow, keeps_float=True, name="dt_proj", **given)
        if mixer_rms_norm:
            norm = lambda name: RMSNorm(epsilon=epsilon, name=name, **given)  # noqa: E731
            self.dt_norm, self.b_norm, self.c_norm = norm("dt_norm"), norm("b_norm"), norm("c_norm")

    def build(self, x_shape, z_shape=None):
        e, n = self.inner, self.d_state
        super().build(x_shape, z_shape)
        # float32 in `call`, also in mixed precision: they are arguments of exponentials.
        time_steps = _initializers.TimeStepBias(self.dt_min, self.dt_max)
        self.dt_bias = self._weight("dt_bias", (e,), time_steps, autocast=False)
        self.A_log = self._weight("A_log", (e, n), _initializers.StateIndexLog(), autocast=False)
        self.D = self._weight("D", (e,), "ones", autocast=False)
        self.x_proj.build((None, None, e))
        self.dt_proj.build((None, None, self.dt_rank))
        if self.mixer_rms_norm:
            self.dt_norm.build((None, None, self.dt_rank))
            self.b_norm.build((None, None, n))
            self.c_norm.build((None, None, n))

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
        plain = return_state and not return_rollback_state and mask is None and segment_ids is None
        if plain and initial_state is not None and (found := self._one_token(x, z, initial_state)):
            return found
        initial = {"conv": None, "ssm": None} if initial_state is None else initial_state

        convolved, conv_state = self.convolve(x, initial["conv"], mask, segment_ids, return_state)
        low_rank, B, C = self._scan_inputs(convolved)
        delta = self.dt_proj(low_rank)
        y, ssm_state = self._scan(convolved, delta, B, C, self.D, z, initial["ssm"], mask, segment_ids)

        state = {"conv": conv_state, "ssm": ssm_state}
        used = {"x": x, "convolved": convolved, "delta": delta, "B": B}
        return append_requested(y, (return_state, state), (return_rollback_state, used))

    def _scan_inputs(self, convolved):
        """Returns the low-rank input of delta, B and C, normalised if `mixer_rms_norm`."""
        r, n = self.dt_rank, self.d_state
        # Slices, because PyTorch cannot export the sizes of a split at given indices.
        projected, normed = self.x_proj(convolved), None
        if self.mixer_rms_norm and _backend.decoding.applies(projected) and self._norms_are_plain(projected):
            normed = _backend.decoding.norms_of_slices(projected, self._norm_scales(), self.epsilon)
        projected = projected if normed is None else normed
        low_rank, B, C = projected[..., :r], projected[..., r : r + n], projected[..., r + n :]
        if self.mixer_rms_norm and normed is None:
            low_rank, B, C = self.dt_norm(low_rank), self.b_norm(B), self.c_norm(C)
        return low_rank, B, C

    def _one_token(self, x, z, initial):
        """Returns `(y, state)` from kernels for a single token after a state, or None if there are none."""
        if x.shape[1] != 1 or not _backend.decoding.applies(x) or requested_scan(self.implementation):
            return None
        layers = self.x_proj, self.dt_proj
        plain = all(layer.quantization_mode is None and layer.is_plain_product(x) for layer in layers)
        if not plain or not self.mixer_rms_norm or not self._norms_are_plain(x):
            return None
        value = ops.convert_to_tensor
        weights = dict(
            kernel=value(self.conv_kernel),
            bias=value(self.conv_bias_weight) if self.conv_bias else None,
            x_matrix=ops.cast(self.x_proj.stored_matrix("kernel"), x.dtype),
            scales=self._norm_scales(),
            dt_matrix=ops.cast(self.dt_proj.stored_matrix("kernel"), x.dtype),
            A=self._A(),
            D=value(self.D),
            dt_bias=value(self.dt_bias),
        )
        found = _backend.decoding.ssm_step(x, z, initial["conv"], initial["ssm"], weights, self.epsilon)
        return None if found is None else (found[0], {"conv": found[1], "ssm": found[2]})

    def _norms_are_plain(self, x):
        norms = self.dt_norm, self.b_norm, self.c_norm
        return all(_backend.trainer.can_bypass_layer_call(norm, x) for norm in norms)

    def _norm_scales(self):
        return tuple(ops.convert_to_tensor(norm.scale) for norm in (self.dt_norm, self.b_norm, self.c_norm))

    def _A(self):
        return -ops.exp(ops.cast(self.A_log, "float32"))

    def _scan(self, u, delta, B, C, D, z, initial_state, mask, segment_ids):
        return selective_scan(
            u,
            delta,
            self._A(),
            B,
            C,
            D,
            z,
            delta_bias=self.dt_bias,
            delta_softplus=True,
            initial_state=initial_state,
            return_last_state=True,
            mask=mask,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def state_after(self, used, state, mask, segment_ids):
        """Returns the state after the tokens that `mask` keeps, from the state before them."""
        # C does not change the state, so that B, of the same shape, can replace it.
        u, delta, B = used["convolved"], used["delta"], used["B"]
        _, ssm_state = self._scan(u, delta, B, B, None, None, state["ssm"], mask, segment_ids)
        return super().state_after(used, state, mask, segment_ids) | {"ssm": ssm_state}

    def state_shapes(self, batch_size):
        return super().state_shapes(batch_size) | {"ssm": ((batch_size, self.inner, self.d_state), "float32")}

    def get_config(self):
        names = ("d_state", "dt_rank", "mixer_rms_norm", "dt_min", "dt_max", "epsilon", "implementation")
        return super().get_config() | {name: getattr(self, name) for name in names}

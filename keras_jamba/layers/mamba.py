"""The Mamba mixer."""

import math

import keras

from keras_jamba.layers._gated_mixer import GatedMixer
from keras_jamba.layers._selective_ssm import SelectiveSSM
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class MambaLayer(GatedMixer):
    """Mamba: a gated selective state space behind a short causal convolution.

    In the order of the architecture document: project to `x` and `z` of width `e = expand * d_model`;
    convolve x over time, SiLU; from x the time step delta, B and C; scan; gate with SiLU(z); project
    back. delta, softplus, A and the scan are float32 under every dtype policy.

    Args:
        d_model: width of input and output.
        d_state: size n of the state of each channel.
        d_conv: width k of the convolution, the present token included.
        expand: inner width as a multiple of d_model.
        dt_rank: rank r of the projection to delta; None is `ceil(d_model / 16)`.
        conv_bias: whether the convolution has a bias.
        proj_bias: whether the projections in and out have one.
        mixer_rms_norm: whether delta's low-rank input, B and C are RMS-normalised, as in Jamba. Plain
            Mamba does not.
        dt_min, dt_max: the time steps that `softplus(dt_bias)` starts between, log-uniformly.
        epsilon: of the three norms.
        bidirectional: whether a second convolution and state space, with weights of their own, run from
            the last token to the first, and what comes out of both is added. For inputs without an arrow
            of time; such a layer has no states to go on from.
        residual_gain: a factor on the start of the last projection. A model of n skip connections passes
            `n**-0.5`, so that it starts no louder than a shallow one (Radford et al. 2019, section 2.3).
        implementation: of the scan; see `keras_jamba.ops.selective_scan`.

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, Keras' own. Tokens where it is False do not exist for the others.
        segment_ids: `(b, t)` integers or None: the document of each token. A change of the id begins a document, so
            0 1 0 are three. No document sees anything of another.
        reset_mask: `(b, t)` bool or None: True where a sequence begins anew. That token begins a document, with the
            same id or without ids, and forgets the initial state. At padding the next real token does.
        initial_state: what an earlier call returned, or `init_cache`; None is zeros.
        return_state: whether to return the final state too.

    Returns:
        `(b, t, d)`; unless bidirectional, token t depends on tokens up to t only. With `return_state`,
        that and the state: `{"conv": (b, k - 1, e)` in the compute dtype, the last inputs of the
        convolution`, "ssm": (b, e, n)` in float32`, "document": (b,)` int32, the last one's number, the least int32
        where none had one`}`. Gradients flow through the first two; `detach_state` ends them.

    Raises:
        ValueError: for arguments out of range, an input of another width, or a state of another layer,
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
        d_model,
        d_state=16,
        d_conv=4,
        expand=2,
        dt_rank=None,
        conv_bias=True,
        proj_bias=False,
        mixer_rms_norm=False,
        dt_min=1e-3,
        dt_max=1e-1,
        epsilon=1e-6,
        bidirectional=False,
        residual_gain=1.0,
        implementation=None,
        **kwargs,
    ):
        super().__init__(d_model, expand, proj_bias, bidirectional, residual_gain, **kwargs)
        for name, value in dict(d_state=d_state, d_conv=d_conv).items():
            _checks.check_integer(name, value)
        if dt_rank is not None:
            _checks.check_integer("dt_rank", dt_rank)
        _checks.check_number("dt_max", dt_max, low=1e-9)
        _checks.check_number("dt_min", dt_min, low=1e-9, high=dt_max)
        _checks.check_number("epsilon", epsilon, low=0)
        self._ssm_config = dict(
            d_state=d_state,
            d_conv=d_conv,
            dt_rank=math.ceil(d_model / 16) if dt_rank is None else dt_rank,
            conv_bias=conv_bias,
            mixer_rms_norm=mixer_rms_norm,
            dt_min=dt_min,
            dt_max=dt_max,
            epsilon=epsilon,
            implementation=implementation,
        )
        self.ssm = self._state_space("ssm")
        if bidirectional:
            self.backward_ssm = self._state_space("backward_ssm")

    def _state_space(self, name):
        return SelectiveSSM(self.inner, **self._ssm_config, dtype=self.dtype_policy, name=name)

    def _directions(self):
        return [self.ssm, self.backward_ssm] if self.bidirectional else [self.ssm]

    def get_config(self):
        return super().get_config() | self._ssm_config

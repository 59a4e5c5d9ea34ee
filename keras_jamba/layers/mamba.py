"""The Mamba mixer."""

import math

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.ops import _checks, causal_depthwise_conv, selective_scan


@keras.saving.register_keras_serializable(package="keras_jamba")
class MambaLayer(keras.layers.Layer):
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
        implementation: of the scan; see `keras_jamba.ops.selective_scan`.

    Call arguments:
        inputs: `(b, t, d)`.

    Returns:
        `(b, t, d)`; token t depends on tokens up to t only.

    Raises:
        ValueError: for arguments out of range or an input of another width.

    Example:
        >>> import keras, keras_jamba
        >>> keras_jamba.layers.MambaLayer(64)(keras.random.normal((2, 10, 64))).shape
        (2, 10, 64)

    Reference:
        [Gu and Dao (2023)](https://arxiv.org/abs/2312.00752);
        the norms: [Lieber et al. (2024)](https://arxiv.org/abs/2403.19887).
    """

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
        implementation=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        sizes = dict(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        for name, value in sizes.items():
            _checks.check_integer(name, value)
        if dt_rank is not None:
            _checks.check_integer("dt_rank", dt_rank)
        _checks.check_number("dt_max", dt_max, low=1e-9)
        _checks.check_number("dt_min", dt_min, low=1e-9, high=dt_max)
        _checks.check_number("epsilon", epsilon, low=0)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.conv_bias, self.proj_bias, self.mixer_rms_norm = conv_bias, proj_bias, mixer_rms_norm
        self.dt_min, self.dt_max, self.epsilon = dt_min, dt_max, epsilon
        self.implementation = implementation
        self.inner = expand * d_model

        def dense(units, name, initializer, use_bias=False):
            return keras.layers.Dense(
                units,
                use_bias=use_bias,
                kernel_initializer=initializer,
                name=name,
                dtype=self.dtype_policy,
            )

        self.in_proj = dense(2 * self.inner, "in_proj", _initializers.xavier(), proj_bias)
        self.x_proj = dense(self.dt_rank + 2 * d_state, "x_proj", _initializers.xavier())
        self.dt_proj = dense(self.inner, "dt_proj", _initializers.uniform(self.dt_rank**-0.5))
        self.out_proj = dense(d_model, "out_proj", _initializers.xavier(0.5), proj_bias)
        if mixer_rms_norm:
            self.dt_norm, self.b_norm, self.c_norm = (
                keras.layers.RMSNormalization(epsilon=epsilon, name=name, dtype=self.dtype_policy)
                for name in ("dt_norm", "b_norm", "c_norm")
            )

    def build(self, input_shape):
        _checks.check_last_axis("MambaLayer", input_shape, self.d_model)
        e, n = self.inner, self.d_state
        bound = self.d_conv**-0.5
        self.conv_kernel = self.add_weight((self.d_conv, e), _initializers.uniform(bound), name="conv_kernel")
        if self.conv_bias:
            self.conv_bias_weight = self.add_weight((e,), _initializers.uniform(bound), name="conv_bias")
        # Kept float32 inside `call` under mixed precision: they act through exponentials.
        self.dt_bias = self.add_weight(
            (e,),
            _initializers.TimeStepBias(self.dt_min, self.dt_max),
            name="dt_bias",
            autocast=False,
        )
        self.A_log = self.add_weight((e, n), _initializers.StateIndexLog(), name="A_log", autocast=False)
        self.D = self.add_weight((e,), "ones", name="D", autocast=False)
        self.in_proj.build((None, None, self.d_model))
        self.x_proj.build((None, None, e))
        self.dt_proj.build((None, None, self.dt_rank))
        self.out_proj.build((None, None, e))
        if self.mixer_rms_norm:
            self.dt_norm.build((None, None, self.dt_rank))
            self.b_norm.build((None, None, n))
            self.c_norm.build((None, None, n))

    def call(self, inputs):
        x, z = ops.split(self.in_proj(inputs), 2, axis=-1)
        bias = self.conv_bias_weight if self.conv_bias else None
        x = ops.silu(causal_depthwise_conv(x, self.conv_kernel, bias))
        r, n = self.dt_rank, self.d_state
        low_rank, B, C = ops.split(self.x_proj(x), [r, r + n], axis=-1)
        if self.mixer_rms_norm:
            low_rank, B, C = self.dt_norm(low_rank), self.b_norm(B), self.c_norm(C)
        y = selective_scan(
            x,
            self.dt_proj(low_rank),
            -ops.exp(ops.cast(self.A_log, "float32")),
            B,
            C,
            D=self.D,
            z=z,
            delta_bias=self.dt_bias,
            delta_softplus=True,
            implementation=self.implementation,
        )
        return self.out_proj(y)

    def compute_output_shape(self, input_shape):
        _checks.check_last_axis("MambaLayer", input_shape, self.d_model)
        return input_shape

    def get_config(self):
        return super().get_config() | {
            "d_model": self.d_model,
            "d_state": self.d_state,
            "d_conv": self.d_conv,
            "expand": self.expand,
            "dt_rank": self.dt_rank,
            "conv_bias": self.conv_bias,
            "proj_bias": self.proj_bias,
            "mixer_rms_norm": self.mixer_rms_norm,
            "dt_min": self.dt_min,
            "dt_max": self.dt_max,
            "epsilon": self.epsilon,
            "implementation": self.implementation,
        }

"""The Mamba mixer."""

import math

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._selective_ssm import SelectiveSSM
from keras_jamba.layers.states import empty_state
from keras_jamba.ops import _checks
from keras_jamba.ops._tokens import NO_DOCUMENT, documents_at_the_ends


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
        bidirectional: whether a second convolution and state space, with weights of their own, run from
            the last token to the first, and what comes out of both is added. For inputs without an arrow
            of time; such a layer has no states to go on from.
        residual_gain: a factor on the start of the last projection. A model of n skip connections passes
            `n**-0.5`, so that it starts no louder than a shallow one (Radford et al. 2019, section 2.3).
        implementation: of the scan; see `keras_jamba.ops.selective_scan`.

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, Keras' own. Tokens where it is False do not exist for the others.
        segment_ids: `(b, t)` integers or None: the document of each token, documents one after the other.
            None sees anything of those before it.
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
        # No autocast: it would round the float32 state to the compute dtype on its way in.
        super().__init__(autocast=False, **kwargs)
        sizes = dict(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        for name, value in sizes.items():
            _checks.check_integer(name, value)
        if dt_rank is not None:
            _checks.check_integer("dt_rank", dt_rank)
        _checks.check_number("dt_max", dt_max, low=1e-9)
        _checks.check_number("dt_min", dt_min, low=1e-9, high=dt_max)
        _checks.check_number("epsilon", epsilon, low=0)
        _checks.check_number("residual_gain", residual_gain, low=0)
        self.supports_masking = True
        self.d_model, self.expand, self.proj_bias = d_model, expand, proj_bias
        self.bidirectional, self.inner = bidirectional, expand * d_model
        self.residual_gain = residual_gain
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
        self.in_proj = self._dense(2 * self.inner, "in_proj", gain=1.0)
        self.out_proj = self._dense(d_model, "out_proj", gain=0.5 * residual_gain)
        self.ssm = SelectiveSSM(self.inner, **self._ssm_config, dtype=self.dtype_policy, name="ssm")
        if bidirectional:
            self.backward_ssm = SelectiveSSM(
                self.inner, **self._ssm_config, dtype=self.dtype_policy, name="backward_ssm"
            )

    def _dense(self, units, name, gain):
        return keras.layers.Dense(
            units,
            use_bias=self.proj_bias,
            kernel_initializer=_initializers.xavier(gain),
            name=name,
            dtype=self.dtype_policy,
        )

    def build(self, input_shape):
        _checks.check_last_axis("MambaLayer", input_shape, self.d_model)
        inner = (None, None, self.inner)
        self.in_proj.build((None, None, self.d_model))
        self.out_proj.build(inner)
        for ssm in [self.ssm, self.backward_ssm] if self.bidirectional else [self.ssm]:
            ssm.build(inner, inner)

    def call(self, inputs, mask=None, segment_ids=None, initial_state=None, return_state=False):
        mask, segment_ids = _checks.check_tokens(mask_of(inputs, mask), segment_ids, inputs.shape)
        if initial_state is not None or return_state:
            self._check_has_state()
        state, document = self._before(inputs, initial_state, mask, segment_ids)
        x, z = ops.split(self.in_proj(inputs), 2, axis=-1)
        y, state = self.ssm(x, z, mask=mask, segment_ids=segment_ids, initial_state=state)
        if self.bidirectional:
            y = y + self._backward(x, z, mask, segment_ids)
        outputs = self.out_proj(y)
        return (outputs, state | {"document": document}) if return_state else outputs

    def _before(self, inputs, state, mask, segment_ids):
        """What the convolution and the scan begin with, and the document that the tokens end in."""
        document = ops.full(ops.shape(inputs)[:1], NO_DOCUMENT, "int32")
        if state is not None:
            state = _checks.check_state("initial_state", state, self._state_specs(inputs.shape[0]))
            document = state["document"]
            state = {name: state[name] for name in ("conv", "ssm")}
        if segment_ids is None:
            return state, document
        goes_on, document = documents_at_the_ends(document, segment_ids, mask)
        if state is not None:
            state = {name: ops.where(goes_on[:, None, None], x, ops.zeros_like(x)) for name, x in state.items()}
        return state, document

    def _backward(self, x, z, mask, segment_ids):
        flip = lambda x: None if x is None else ops.flip(x, axis=1)  # noqa: E731
        # Turned round, the documents' numbers would decrease.
        ids = None if segment_ids is None else -flip(segment_ids)
        return flip(self.backward_ssm(flip(x), flip(z), mask=flip(mask), segment_ids=ids)[0])

    def init_cache(self, batch_size, max_length=None):
        """The state before the first token. `max_length` is there for the sake of attention alone."""
        self._check_has_state()
        _checks.check_integer("batch_size", batch_size)
        return empty_state(self._state_specs(batch_size))

    def step(self, inputs, cache, mask=None, segment_ids=None):
        """Some more tokens, `(b, t, d)`, after those that the cache has seen; `(outputs, cache)`.

        The same as a call with `initial_state`; the cost does not depend on how many those were.
        """
        return self(inputs, mask=mask, segment_ids=segment_ids, initial_state=cache, return_state=True)

    def _check_has_state(self):
        if self.bidirectional:
            raise ValueError(
                "A bidirectional MambaLayer has no state to go on from: it needs the whole sequence at once. "
                "Received: bidirectional=True. Build the layer with bidirectional=False."
            )

    def _state_specs(self, batch_size):
        conv = (batch_size, self._ssm_config["d_conv"] - 1, self.inner)
        ssm = (batch_size, self.inner, self._ssm_config["d_state"])
        leaves = {"conv": (conv, self.compute_dtype), "ssm": (ssm, "float32"), "document": ((batch_size,), "int32")}
        return {name: keras.KerasTensor(*leaf) for name, leaf in leaves.items()}

    def compute_output_spec(self, inputs, mask=None, segment_ids=None, initial_state=None, return_state=False):
        _checks.check_last_axis("MambaLayer", inputs.shape, self.d_model)
        outputs = keras.KerasTensor(inputs.shape, self.compute_dtype)
        return (outputs, self._state_specs(inputs.shape[0])) if return_state else outputs

    def get_config(self):
        ours = dict(d_model=self.d_model, expand=self.expand, proj_bias=self.proj_bias)
        return (
            super().get_config()
            | ours
            | self._ssm_config
            | {
                "bidirectional": self.bidirectional,
                "residual_gain": self.residual_gain,
            }
        )

"""One direction of a Mamba layer: the short convolution and the state space that it feeds."""

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.layers._asked import asked
from keras_jamba.layers._norm import RMSNorm
from keras_jamba.layers._projection import Projection
from keras_jamba.layers._short_convolution import ShortConvolution
from keras_jamba.ops import selective_scan


@keras.saving.register_keras_serializable(package="keras_jamba")
class SelectiveSSM(ShortConvolution):
    """Convolution, SiLU, the projections to delta, B and C, and the gated scan; see `MambaLayer`.

    Call arguments:
        x, z: `(b, t, e)`, what enters, and the gate.
        mask, segment_ids: `(b, t)` or None.
        initial_state: `{"conv": (b, k - 1, e), "ssm": (b, e, n)}` or None.
        return_state: whether to return the final state.
        return_trail: whether to return what `state_after` needs of the tokens too.

    Returns:
        `((b, t, e), final state)`, or that and the trail; without a state, no state.
    """

    trail = ("x", "convolved", "delta", "B")

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
        # Small, and what comes out of it acts through exponentials.
        self.dt_proj = Projection(inner, kernel_initializer=narrow, keeps_float=True, name="dt_proj", **given)
        if mixer_rms_norm:
            self.dt_norm, self.b_norm, self.c_norm = (
                RMSNorm(epsilon=epsilon, name=name, dtype=self.dtype_policy) for name in ("dt_norm", "b_norm", "c_norm")
            )

    def build(self, x_shape, z_shape=None):
        e, n = self.inner, self.d_state
        super().build(x_shape, z_shape)
        # Kept float32 inside `call` under mixed precision: they act through exponentials.
        start = _initializers.TimeStepBias(self.dt_min, self.dt_max)
        self.dt_bias = self._weight("dt_bias", (e,), start, autocast=False)
        self.A_log = self._weight("A_log", (e, n), _initializers.StateIndexLog(), autocast=False)
        self.D = self._weight("D", (e,), "ones", autocast=False)
        self.x_proj.build((None, None, e))
        self.dt_proj.build((None, None, self.dt_rank))
        if self.mixer_rms_norm:
            self.dt_norm.build((None, None, self.dt_rank))
            self.b_norm.build((None, None, n))
            self.c_norm.build((None, None, n))

    def call(self, x, z, mask=None, segment_ids=None, initial_state=None, return_state=True, return_trail=False):
        state = {"conv": None, "ssm": None} if initial_state is None else initial_state
        before, (x, conv_state) = x, self.convolved(x, state["conv"], mask, segment_ids, return_state)
        r, n = self.dt_rank, self.d_state
        # Slices: PyTorch cannot export the sizes that come out of a split at given places.
        projected = self.x_proj(x)
        low_rank, B, C = projected[..., :r], projected[..., r : r + n], projected[..., r + n :]
        if self.mixer_rms_norm:
            low_rank, B, C = self.dt_norm(low_rank), self.b_norm(B), self.c_norm(C)
        trail = {"x": before, "convolved": x, "delta": self.dt_proj(low_rank), "B": B}
        y, ssm_state = self._scan(trail, C, state["ssm"], mask, segment_ids, D=self.D, z=z)
        return asked(y, (return_state, {"conv": conv_state, "ssm": ssm_state}), (return_trail, trail))

    def _scan(self, trail, C, initial_state, mask, segment_ids, **skip_and_gate):
        return selective_scan(
            trail["convolved"],
            trail["delta"],
            -ops.exp(ops.cast(self.A_log, "float32")),
            trail["B"],
            C,
            **skip_and_gate,
            delta_bias=self.dt_bias,
            delta_softplus=True,
            initial_state=initial_state,
            return_last_state=True,
            mask=mask,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def state_after(self, tokens, state, mask, segment_ids):
        # C reads the state and does not change it: here whatever has its shape will do.
        _, ssm_state = self._scan(tokens, tokens["B"], state["ssm"], mask, segment_ids)
        return super().state_after(tokens, state, mask, segment_ids) | {"ssm": ssm_state}

    def state_shapes(self, batch_size):
        return super().state_shapes(batch_size) | {"ssm": ((batch_size, self.inner, self.d_state), "float32")}

    def get_config(self):
        names = ("d_state", "dt_rank", "mixer_rms_norm", "dt_min", "dt_max", "epsilon", "implementation")
        return super().get_config() | {name: getattr(self, name) for name in names}

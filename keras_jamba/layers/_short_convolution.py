"""The causal depthwise convolution that both kinds of gated mixers begin with."""

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.layers._asked import asked
from keras_jamba.layers._decay import without_decay
from keras_jamba.ops import causal_depthwise_conv
from keras_jamba.ops.convolution import last_inputs


class ShortConvolution(keras.layers.Layer):
    """Holds the weights of the convolution, and convolves; what follows is the subclass' `call`.

    Args:
        inner: width e.
        d_conv: width k of the kernel.
        conv_bias: whether it has a bias.
    """

    # What of its tokens a trail holds.
    trail = ("x",)

    def __init__(self, inner, d_conv, conv_bias, **kwargs):
        # No autocast: it would round a float32 state to the compute dtype on its way in.
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        self.inner, self.d_conv, self.conv_bias = inner, d_conv, conv_bias

    def build(self, x_shape, z_shape=None):
        bound = self.d_conv**-0.5
        self.conv_kernel = self._weight("conv_kernel", (self.d_conv, self.inner), _initializers.uniform(bound))
        if self.conv_bias:
            self.conv_bias_weight = self._weight("conv_bias", (self.inner,), _initializers.uniform(bound))

    def _weight(self, name, shape, initializer, **kwargs):
        return without_decay(self.add_weight(shape, initializer, name=name, **kwargs))

    def convolved(self, x, initial_state, mask, segment_ids, return_state):
        """`(SiLU of the convolution (b, t, e), the last k - 1 inputs or None)`."""
        outputs = causal_depthwise_conv(
            x,
            self.conv_kernel,
            self.conv_bias_weight if self.conv_bias else None,
            initial_state,
            return_last_state=return_state,
            mask=mask,
            segment_ids=segment_ids,
            activation="silu",
        )
        return outputs if return_state else (outputs, None)

    def state_after(self, tokens, state, mask, segment_ids):
        """The state after the tokens of a trail that the mask leaves, from the state before them."""
        return {"conv": last_inputs(tokens["x"], state["conv"], mask, segment_ids, self.d_conv)}

    def state_shapes(self, batch_size):
        """`{name: (shape, dtype)}` of the state."""
        return {"conv": ((batch_size, self.d_conv - 1, self.inner), self.compute_dtype)}

    def get_config(self):
        return super().get_config() | {"inner": self.inner, "d_conv": self.d_conv, "conv_bias": self.conv_bias}


@keras.saving.register_keras_serializable(package="keras_jamba")
class GatedConvolution(ShortConvolution):
    """Convolution, SiLU and gate: one direction of a `GatedConvLayer`.

    Call arguments:
        x, z: `(b, t, e)`, what enters, and the gate.
        mask, segment_ids: `(b, t)` or None.
        initial_state: `{"conv": (b, k - 1, e)}` or None.
        return_state: whether to return the final state.
        return_trail: whether to return what `state_after` needs of the tokens too.

    Returns:
        `((b, t, e), final state)`, or that and the trail; without a state, no state.
    """

    def call(self, x, z, mask=None, segment_ids=None, initial_state=None, return_state=True, return_trail=False):
        state = None if initial_state is None else initial_state["conv"]
        y, state = self.convolved(x, state, mask, segment_ids, return_state)
        return asked(y * ops.silu(z), (return_state, {"conv": state}), (return_trail, {"x": x}))

"""The causal depthwise convolution at the start of `SelectiveSSM` and `GatedConvolution`."""

import keras

from keras_jamba.layers import _initializers
from keras_jamba.layers._decay import without_decay
from keras_jamba.layers._eager_fast_path import EagerFastPath
from keras_jamba.ops import causal_depthwise_conv
from keras_jamba.ops.convolution import last_inputs


class ShortConvolution(EagerFastPath, keras.layers.Layer):
    """The weights and the state of the convolution. A subclass adds `call`.

    Args:
        inner: width e.
        d_conv: width w of the kernel.
        conv_bias: whether the convolution has a bias.
    """

    # The tensors that `state_after` reads.
    rollback_names: tuple[str, ...] = ("x",)

    def __init__(self, inner, d_conv, conv_bias, **kwargs):
        # Autocast would round a float32 state to the compute dtype.
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

    def convolve(self, x, initial_state, mask, segment_ids, return_state):
        """Returns `(SiLU of the convolution (b, t, e), the last w - 1 inputs or None)`."""
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

    def state_after(self, used, state, mask, segment_ids):
        """Returns the state after the tokens that `mask` keeps, from the state before them."""
        return {"conv": last_inputs(used["x"], state["conv"], mask, segment_ids, self.d_conv)}

    def state_shapes(self, batch_size):
        """Returns `{name: (shape, dtype)}` of the state."""
        return {"conv": ((batch_size, self.d_conv - 1, self.inner), self.compute_dtype)}

    def get_config(self):
        return super().get_config() | {"inner": self.inner, "d_conv": self.d_conv, "conv_bias": self.conv_bias}

"""The Mamba mixer without its state space."""

import keras

from keras_jamba.layers._gated_mixer import GatedMixer
from keras_jamba.layers._short_convolution import GatedConvolution
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class GatedConvLayer(GatedMixer):
    """A gated causal convolution: `MambaLayer` without its state space, to see what the state space adds.

    Project to `x` and `z` of width `e = expand * d_model`; convolve x over time, SiLU; gate with SiLU(z); project
    back. A token sees the `d_conv - 1` tokens before it in each such layer.

    Args:
        d_model: width of input and output.
        d_conv: width k of the convolution, the present token included.
        expand: inner width as a multiple of d_model.
        conv_bias: whether the convolution has a bias.
        proj_bias: whether the projections in and out have one.
        bidirectional: whether a second convolution, with weights of its own, runs from the last token to the first,
            and what comes out of both is added. Such a layer has no states to go on from.
        residual_gain: see `MambaLayer`.

    Call arguments:
        inputs, mask, segment_ids, reset_mask, initial_state, return_state: see `MambaLayer`.

    Returns:
        `(b, t, d)`; with `return_state` that and the state: `{"conv": (b, k - 1, e), "document": (b,)}`.

    Raises:
        ValueError: for arguments out of range, an input of another width, or a state of another layer, batch or
            dtype.

    Example:
        >>> import keras, keras_jamba
        >>> keras_jamba.layers.GatedConvLayer(64)(keras.random.normal((2, 10, 64))).shape
        (2, 10, 64)

    Reference:
        [Yu and Wang (2024)](https://arxiv.org/abs/2405.07992), who classify images with such blocks.
    """

    @_checks.python_numbers
    def __init__(
        self,
        d_model,
        d_conv=4,
        expand=2,
        conv_bias=True,
        proj_bias=False,
        bidirectional=False,
        residual_gain=1.0,
        **kwargs,
    ):
        super().__init__(d_model, expand, proj_bias, bidirectional, residual_gain, **kwargs)
        _checks.check_integer("d_conv", d_conv)
        self.d_conv, self.conv_bias = d_conv, conv_bias
        self.conv = self._convolution("conv")
        if bidirectional:
            self.backward_conv = self._convolution("backward_conv")

    def _convolution(self, name):
        return GatedConvolution(self.inner, self.d_conv, self.conv_bias, dtype=self.dtype_policy, name=name)

    def _directions(self):
        return [self.conv, self.backward_conv] if self.bidirectional else [self.conv]

    def get_config(self):
        return super().get_config() | {"d_conv": self.d_conv, "conv_bias": self.conv_bias}

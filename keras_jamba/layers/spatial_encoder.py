"""From an image to a grid of feature vectors."""

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.layers._decay import without_decay
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class SpatialEncoder(keras.layers.Layer):
    """A small CNN, O(HW): 3x3 convolutions, each with a batch norm and a SiLU.

    Four of them, or two more than there are halvings of height and width. The first and the last keep
    height and width, and the halvings come as late as they can: what lies between two pixels is seen
    before it is thrown away. The first two have half the width, but 32 channels at least.

    Args:
        d_model: width of the features; even.
        downsample: pixels along one side of a grid cell: 1, 2, 4, 8, ...

    Call arguments:
        inputs: `(b, H, W, C)`, channels last whatever Keras' image data format is.
        training: whether the batch norm uses this batch.

    Returns:
        `(b, ceil(H / downsample), ceil(W / downsample), d)`.

    Raises:
        ValueError: for arguments out of range or inputs that are not four-dimensional.
    """

    def __init__(self, d_model, downsample=4, **kwargs):
        super().__init__(**kwargs)
        for name, value in dict(d_model=d_model, downsample=downsample).items():
            _checks.check_integer(name, value)
        if downsample & (downsample - 1):
            raise ValueError(
                f"downsample must be a power of two. Received: downsample={downsample}. Pass 1, 2, 4, 8, ..."
            )
        self.d_model, self.downsample = d_model, downsample
        halvings = downsample.bit_length() - 1
        strides = [1] + [1] * (2 - halvings) + [2] * halvings + [1]
        widths = [max(32, d_model // 2)] * 2 + [d_model] * (len(strides) - 2)
        self.convolutions = [
            keras.layers.Conv2D(
                width,
                3,
                stride,
                padding="same",
                use_bias=False,
                kernel_initializer=_initializers.xavier(),
                data_format="channels_last",
                name=f"conv_{i}",
                dtype=self.dtype_policy,
            )
            for i, (width, stride) in enumerate(zip(widths, strides, strict=True))
        ]
        self.norms = [
            keras.layers.BatchNormalization(axis=-1, momentum=0.9, name=f"norm_{i}", dtype=self.dtype_policy)
            for i in range(len(strides))
        ]

    def build(self, input_shape):
        if len(input_shape) != 4:
            raise ValueError(
                "The input of SpatialEncoder must have the shape (b, H, W, C). "
                f"Received: shape={tuple(input_shape)}. Add the axis that is missing."
            )
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            convolution.build(input_shape)
            without_decay(convolution.kernel)
            input_shape = convolution.compute_output_shape(input_shape)
            norm.build(input_shape)

    def call(self, inputs, training=None):
        x = inputs
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = ops.silu(norm(convolution(x), training=training))
        return x

    def compute_output_shape(self, input_shape):
        for convolution in self.convolutions:
            input_shape = convolution.compute_output_shape(input_shape)
        return input_shape

    def get_config(self):
        return super().get_config() | {"d_model": self.d_model, "downsample": self.downsample}

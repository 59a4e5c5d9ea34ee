"""From an image to a grid of feature vectors."""

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.layers._decay import without_decay
from keras_jamba.layers._grid_encoder import GridEncoder
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class SpatialEncoder(GridEncoder):
    """A small CNN, O(HW): 3x3 convolutions, each with a batch norm and a SiLU.

    Four of them, or two more than there are halvings of height and width. The first and the last keep
    height and width, and the halvings come as late as they can: what lies between two pixels is seen
    before it is thrown away. The first two have half the width, but 32 channels at least.

    Args:
        d_model: width of the features; even.
        downsample: pixels along one side of a grid cell: 1, 2, 4, 8, ...

    Call arguments:
        inputs: `(b, H, W, C)`, or `(b, T, H, W, C)`, frames that are encoded like as many images; channels last
            whatever Keras' image data format is.
        training: whether the batch norm uses this batch.

    Returns:
        `(b, H', W', d)` or `(b, T, H', W', d)` with `H' = ceil(H / downsample)`, `W' = ceil(W / downsample)`.

    Raises:
        ValueError: for arguments out of range or inputs of another number of axes.
    """

    @_checks.python_numbers
    def __init__(self, d_model, downsample=4, **kwargs):
        super().__init__(d_model, downsample, **kwargs)
        if downsample & (downsample - 1):
            raise ValueError(
                f"downsample must be a power of two. Received: downsample={downsample}. Pass 1, 2, 4, 8, ..."
            )
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

    def build_for_images(self, shape):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            convolution.build(shape)
            without_decay(convolution.kernel)
            shape = convolution.compute_output_shape(shape)
            norm.build(shape)

    def encode(self, images, training):
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = ops.silu(norm(convolution(x), training=training))
        return x

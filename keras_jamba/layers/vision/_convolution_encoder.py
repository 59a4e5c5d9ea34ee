"""The base class of encoders that are lists of convolutions, and the widths and strides of these lists."""

import keras
from keras import ops

from keras_jamba._typing import Shape
from keras_jamba.layers import _initializers
from keras_jamba.layers._batch_norm import BatchNormalization
from keras_jamba.layers._decay import without_decay
from keras_jamba.layers.vision._grid_encoder import GridEncoder

_LEAST_WIDTH = 32


def check_power_of_two(downsample):
    """Raises ValueError for a downsample that strides of 2 cannot reach."""
    if downsample & (downsample - 1):
        raise ValueError(f"downsample must be a power of two. Received: downsample={downsample}. Pass 1, 2, 4, 8, ...")


def spatial_sizes(d_model, downsample):
    """Returns `[(width, stride)]` of the convolutions of `SpatialEncoder`."""
    halvings = downsample.bit_length() - 1
    strides = [1] + [1] * (2 - halvings) + [2] * halvings + [1]
    widths = [max(_LEAST_WIDTH, d_model // 2)] * 2 + [d_model] * (len(strides) - 2)
    return list(zip(widths, strides, strict=True))


def residual_sizes(d_model, downsample, blocks):
    """Returns `[(width, stride)]` of the convolutions of `ResidualEncoder`.

    Each stage is one convolution, which leads to the stage's resolution, and `blocks` pairs of convolutions.
    """
    halvings = downsample.bit_length() - 1
    sizes = []
    for stage in range(halvings + 1):
        width = min(d_model, max(_LEAST_WIDTH, d_model >> (halvings - stage)))
        sizes += [(width, 2 if stage else 1)] + [(width, 1)] * (2 * blocks)
    return sizes


class ConvolutionEncoder(GridEncoder):
    """3x3 convolutions without biases, and a batch norm after each.

    A subclass calls `_set_sizes` in its constructor, and defines `encode(images, training)`.
    """

    # Whether weight decay applies to the kernels.
    _kernels_decay = False

    def _set_sizes(self, sizes):
        """Creates the layers. `sizes` is `[(width, stride)]`.

        Raises:
            ValueError: if downsample is no power of two.
        """
        check_power_of_two(self.downsample)
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
            for i, (width, stride) in enumerate(sizes)
        ]
        self.norms = [BatchNormalization(name=f"norm_{i}", dtype=self.dtype_policy) for i in range(len(sizes))]

    def build_for_images(self, shape: Shape) -> None:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            convolution.build(shape)
            if not self._kernels_decay:
                without_decay(convolution.kernel)
            shape = convolution.compute_output_shape(shape)
            norm.build(shape)

    def _normed(self, i, x, training):
        """Returns convolution i of x, with its batch norm."""
        return self.norms[i](self.convolutions[i](x), training=training)

    def _activated(self, i, x, training):
        return ops.silu(self._normed(i, x, training))

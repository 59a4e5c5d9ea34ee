"""From an image to a grid of feature vectors."""

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.layers._batch_norm import BatchNormalization
from keras_jamba.layers._decay import without_decay
from keras_jamba.layers.vision._grid_encoder import GridEncoder
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class SpatialEncoder(GridEncoder):
    """A small CNN, O(HW): 3x3 convolutions, each with a batch norm and a SiLU.

    Four of them, or two more than there are halvings of height and width. The first and the last keep
    height and width, and the halvings come as late as they can: what lies between two pixels is seen
    before it is thrown away. The first two have half the width, but 32 channels at least.

    In training a batch norm uses the statistics of the batch, in inference moving ones. The first batch sets these, and
    later ones are averaged with momentum 0.8, so that inference is right after the first epoch of a short training too.
    Statistics begin with the first batch as in Adam, whose averages are free of their initial values
    ([Kingma and Ba (2015)](https://arxiv.org/abs/1412.6980), section 3). Alternatives were compared in
    `benchmarks/short_training.py`. Under `trainable=False` the moving statistics stay as they are, and are used in
    training too.

    Args:
        d_model: width of the features; even.
        downsample: pixels along one side of a grid cell: 1, 2, 4, 8, ...

    Call arguments:
        inputs: `(b, H, W, C)`, or `(b, T, H, W, C)`, frames that are encoded like as many images; channels last
            whatever Keras' image data format is.
        training: whether batch norms use the statistics of this batch and update the moving ones.

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
        self.norms = [BatchNormalization(name=f"norm_{i}", dtype=self.dtype_policy) for i in range(len(strides))]

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

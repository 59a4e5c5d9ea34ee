"""Encoder of images to grids of features by convolutions."""

from typing import Any

import keras

from keras_jamba._typing import Tensor
from keras_jamba.layers.vision._convolution_encoder import ConvolutionEncoder, spatial_sizes
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class SpatialEncoder(ConvolutionEncoder):
    """Small CNN, O(HW): 3x3 convolutions, each with a batch norm and a SiLU.

    The CNN has four convolutions, or two more than the number of halvings of height and width if that is larger. The
    first and the last convolution keep height and width. Strides come last, so that the
    earlier convolutions read all pixels. The first two convolutions have half the width, but at
    least 32 channels.

    In training, a batch norm uses the batch statistics; in inference, the moving statistics. The first batch sets the
    moving statistics, and later batches update them with momentum 0.8. Inference is therefore right after one epoch of
    a short training. Adam's averages are free of their initial values in the same way
    ([Kingma and Ba (2015)](https://arxiv.org/abs/1412.6980), section 3). `benchmarks/training/short_training.py`
    compares alternatives. With `trainable=False`, training also uses the moving statistics and does not update them.

    Args:
        d_model: width of the features; even.
        downsample: pixels along one side of a grid cell: 1, 2, 4, 8, ...

    Call arguments:
        inputs: `(b, H, W, C)`, or `(b, T, H, W, C)` with frames encoded as single images. Channels are last,
            independent of Keras' image data format.
        training: whether batch norms use the batch statistics and update the moving statistics.

    Returns:
        `(b, H', W', d)` or `(b, T, H', W', d)` with `H' = ceil(H / downsample)`, `W' = ceil(W / downsample)`.

    Raises:
        ValueError: if an argument is out of range or the inputs have another number of axes.
    """

    @_checks.python_numbers
    def __init__(self, d_model: int, downsample: int = 4, **kwargs: Any) -> None:
        super().__init__(d_model, downsample, **kwargs)
        self._set_sizes(spatial_sizes(d_model, downsample))

    def encode(self, images: Tensor, training: bool | None) -> Tensor:
        x = images
        for i in range(len(self.convolutions)):
            x = self._activated(i, x, training)
        return x

"""Encoder of images to grids of features by residual convolutions."""

from typing import Any

import keras
from keras import ops

from keras_jamba._typing import Config, Tensor
from keras_jamba.layers.vision._convolution_encoder import ConvolutionEncoder, residual_sizes
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class ResidualEncoder(ConvolutionEncoder):
    """Residual CNN, O(HW): stages of residual blocks, each stage at half the height and width of the one before.

    A 3x3 convolution leads to each stage, with stride 2 from the second stage on. Each stage then has `blocks` residual
    blocks `silu(x + norm(conv(silu(norm(conv(x))))))`. Every stage has twice the width of the one before, the last
    d_model and none less than 32 channels, unless d_model is less. See `SpatialEncoder` for the statistics of batch
    norms. Weight decay applies to the kernels.

    Args:
        d_model: width of the features.
        downsample: pixels along one side of a grid cell: 1, 2, 4, 8, ...
        blocks: residual blocks per stage.

    Call arguments:
        inputs: `(b, H, W, C)`, or `(b, T, H, W, C)` with frames encoded as single images. Channels are last,
            independent of Keras' image data format.
        training: whether batch norms use the batch statistics and update the moving statistics.

    Returns:
        `(b, H', W', d)` or `(b, T, H', W', d)` with `H' = ceil(H / downsample)`, `W' = ceil(W / downsample)`.

    Raises:
        ValueError: if an argument is out of range or the inputs have another number of axes.

    Reference:
        [He et al. (2016)](https://arxiv.org/abs/1512.03385).
    """

    _kernels_decay = True

    @_checks.python_numbers
    def __init__(self, d_model: int, downsample: int = 4, blocks: int = 1, **kwargs: Any) -> None:
        super().__init__(d_model, downsample, **kwargs)
        _checks.check_integer("blocks", blocks)
        self.blocks = blocks
        self._set_sizes(residual_sizes(d_model, downsample, blocks))

    def encode(self, images: Tensor, training: bool | None) -> Tensor:
        x = images
        stage = 2 * self.blocks + 1
        for first in range(0, len(self.convolutions), stage):
            x = self._activated(first, x, training)
            for i in range(first + 1, first + stage, 2):
                y = self._normed(i + 1, self._activated(i, x, training), training)
                x = ops.silu(x + y)
        return x

    def get_config(self) -> Config:
        return super().get_config() | {"blocks": self.blocks}

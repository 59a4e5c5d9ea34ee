"""Encoder of images to grids of features by patches."""

from typing import Any

import keras

from keras_jamba._typing import Shape, Tensor
from keras_jamba.layers import _initializers
from keras_jamba.layers.vision._grid_encoder import GridEncoder
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class PatchEncoder(GridEncoder):
    """Projection of each non-overlapping patch to a vector, then an RMSNorm: the stem of vision transformers.

    Zero padding completes the patches at the borders.

    Args:
        d_model: width of the features.
        downsample: pixels along one side of a patch.

    Call arguments:
        inputs: `(b, H, W, C)` or `(b, T, H, W, C)`, channels last.

    Returns:
        `(b, H', W', d)` or `(b, T, H', W', d)` with `H' = ceil(H / downsample)`, `W' = ceil(W / downsample)`.

    Raises:
        ValueError: if an argument is out of range or the inputs have another number of axes.

    Reference:
        [Dosovitskiy et al. (2021)](https://arxiv.org/abs/2010.11929).
    """

    @_checks.python_numbers
    def __init__(self, d_model: int, downsample: int = 4, **kwargs: Any) -> None:
        super().__init__(d_model, downsample, **kwargs)
        self.projection = keras.layers.Conv2D(
            d_model,
            downsample,
            downsample,
            padding="same",
            kernel_initializer=_initializers.xavier(),
            data_format="channels_last",
            name="projection",
            dtype=self.dtype_policy,
        )
        self.norm = keras.layers.RMSNormalization(epsilon=1e-6, name="norm", dtype=self.dtype_policy)

    def build_for_images(self, shape: Shape) -> None:
        self.projection.build(shape)
        self.norm.build(self.projection.compute_output_shape(shape))

    def encode(self, images: Tensor, training: bool | None) -> Tensor:
        return self.norm(self.projection(images))

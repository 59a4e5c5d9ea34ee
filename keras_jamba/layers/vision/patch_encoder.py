"""From an image to a grid of feature vectors, by cutting it up."""

import keras

from keras_jamba.layers import _initializers
from keras_jamba.layers.vision._grid_encoder import GridEncoder
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class PatchEncoder(GridEncoder):
    """Patches that do not overlap, each projected to a vector, and an RMSNorm: the stem of vision transformers.

    What the image lacks to whole patches is filled up with zeros.

    Args:
        d_model: width of the features.
        downsample: pixels along one side of a patch.

    Call arguments:
        inputs: `(b, H, W, C)` or `(b, T, H, W, C)`, channels last.

    Returns:
        `(b, H', W', d)` or `(b, T, H', W', d)` with `H' = ceil(H / downsample)`, `W' = ceil(W / downsample)`.

    Raises:
        ValueError: for arguments out of range or inputs of another number of axes.

    Reference:
        [Dosovitskiy et al. (2021)](https://arxiv.org/abs/2010.11929).
    """

    @_checks.python_numbers
    def __init__(self, d_model, downsample=4, **kwargs):
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

    def build_for_images(self, shape):
        self.projection.build(shape)
        self.norm.build(self.projection.compute_output_shape(shape))

    def encode(self, images, training):
        return self.norm(self.projection(images))

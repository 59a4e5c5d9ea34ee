"""Rotation, zoom, shear and translation in one pass over the pixels."""

import math
from typing import Any

import keras
from keras import ops

from keras_jamba._typing import Config, Shape, Tensor
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class RandomAffine(keras.layers.Layer):
    """A layer that rotates, scales, shears and translates each image by random amounts. Pixels from outside are 0.

    It combines Keras' `RandomRotation`, `RandomZoom`, `RandomShear` and `RandomTranslation` with one interpolation
    instead of four. Each interpolation blurs, and a classifier of small images trained only on blurred ones is worse on
    sharp ones.

    Args:
        rotation: the largest rotation to either side, in degrees.
        zoom: the largest relative change of height and width, which are drawn independently.
        shear: the largest shift of a row against the row above it, in pixels.
        translation: the largest shift of the image, as a share of height and width.
        seed: seed of the random numbers.

    Call arguments:
        images: `(b, h, w, c)` floats.
        training: whether images are transformed. Otherwise they are returned unchanged.

    Returns:
        Images of the same shape, interpolated bilinearly.

    Raises:
        ValueError: for negative amounts, and a zoom above 0.99.
    """

    def __init__(
        self,
        rotation: float = 0.0,
        zoom: float = 0.0,
        shear: float = 0.0,
        translation: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in dict(rotation=rotation, shear=shear, translation=translation).items():
            _checks.check_number(name, value, low=0)
        _checks.check_number("zoom", zoom, low=0, high=0.99)
        self.rotation, self.zoom, self.shear, self.translation = rotation, zoom, shear, translation
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: Shape) -> None:
        if len(input_shape) != 4:
            raise ValueError(
                f"Images must have the shape (b, h, w, c). Received: shape={tuple(input_shape)}. Add the missing "
                "axis. Pass clips frame by frame, as `Augmentation` does."
            )

    def call(self, images: Tensor, training: bool | None = None) -> Tensor:
        if not training:
            return images
        # Half precision would round pixel positions.
        images = ops.cast(images, "float32")
        shape = ops.shape(images)
        changed = ops.image.affine_transform(
            images, self._transforms(*shape[:3]), interpolation="bilinear", fill_mode="constant", fill_value=0.0,
            data_format="channels_last",
        )  # fmt: skip
        return ops.cast(changed, self.compute_dtype)

    def _transforms(self, count, height, width):
        """Returns `(b, 8)` transforms from an output pixel `(x, y)` to its position in the input image."""
        draw = keras.random.uniform((count, 6), -1.0, 1.0, dtype="float32", seed=self.generator)
        angle, shear = draw[:, 0] * math.radians(self.rotation), draw[:, 1] * self.shear
        scale = 1.0 + self.zoom * draw[:, 2:4]
        size = ops.cast(ops.stack([width, height]), "float32")
        middle = (size - 1.0) / 2.0
        shifted = middle + self.translation * size * draw[:, 4:6]
        cos, sin = ops.cos(angle), ops.sin(angle)
        x = ops.stack([cos / scale[:, 0], (cos * shear - sin) / scale[:, 1]], axis=-1)
        y = ops.stack([sin / scale[:, 0], (sin * shear + cos) / scale[:, 1]], axis=-1)
        rows = []
        for i, row in enumerate((x, y)):
            rows += [row, (middle[i] - ops.sum(row * shifted, axis=-1))[:, None]]
        return ops.concatenate([*rows, ops.zeros((count, 2), "float32")], axis=-1)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        names = ("rotation", "zoom", "shear", "translation", "seed")
        return super().get_config() | {name: getattr(self, name) for name in names}

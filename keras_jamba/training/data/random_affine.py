"""Rotation, zoom, shear and translation in one pass over the pixels."""

import math

import keras
from keras import ops

from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class RandomAffine(keras.layers.Layer):
    """Turns, scales, slants and moves each image by amounts of its own; what comes in at the edges is empty.

    What Keras' `RandomRotation`, `RandomZoom`, `RandomShear` and `RandomTranslation` do one after the other, with one
    interpolation instead of four: each blurs, and a classifier of small images that has seen only blurred ones is
    worse on sharp ones.

    Args:
        rotation: degrees to either side at most.
        zoom: share of the size by which height and width, each by itself, grow or shrink at most.
        shear: pixels by which a row is pushed against the one above it at most.
        translation: share of height and width by which the image is moved at most.
        seed: of the random numbers.

    Call arguments:
        images: `(b, h, w, c)` floats.
        training: whether to change anything.

    Returns:
        Images of the same shape, interpolated bilinearly.

    Raises:
        ValueError: for amounts that are negative, and a zoom of 1 or more.
    """

    def __init__(self, rotation=0.0, zoom=0.0, shear=0.0, translation=0.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        for name, value in dict(rotation=rotation, shear=shear, translation=translation).items():
            _checks.check_number(name, value, low=0)
        _checks.check_number("zoom", zoom, low=0, high=0.99)
        self.rotation, self.zoom, self.shear, self.translation = rotation, zoom, shear, translation
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        if len(input_shape) != 4:
            raise ValueError(
                f"Images must have the shape (b, h, w, c). Received: shape={tuple(input_shape)}. Add the axis that is "
                "missing; clips go frame by frame, as `Augmentation` gives them."
            )

    def call(self, images, training=None):
        if not training:
            return images
        # Positions of pixels, which half precision would round.
        images = ops.cast(images, "float32")
        shape = ops.shape(images)
        changed = ops.image.affine_transform(
            images, self._transforms(*shape[:3]), interpolation="bilinear", fill_mode="constant", fill_value=0.0,
            data_format="channels_last",
        )  # fmt: skip
        return ops.cast(changed, self.compute_dtype)

    def _transforms(self, count, height, width):
        """`(b, 8)`: from the place `(x, y)` of a pixel to where in the image it comes from."""
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

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        names = ("rotation", "zoom", "shear", "translation", "seed")
        return super().get_config() | {name: getattr(self, name) for name in names}

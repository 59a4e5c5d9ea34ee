"""The base class of image encoders."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_jamba._typing import Config, Shape, Tensor
from keras_jamba.layers._trainable import KeepsTrainable
from keras_jamba.ops import _checks


class GridEncoder(KeepsTrainable, keras.layers.Layer):
    """Encoder of images `(b, H, W, C)` to grids of features `(b, H', W', d)`; it encodes frames of clips as a batch.

    A subclass defines `build_for_images(shape)` and `encode(images, training)`, both for four axes.

    Args:
        d_model: width of the features.
        downsample: pixels along one side of a grid cell.
    """

    @_checks.python_numbers
    def __init__(self, d_model: int, downsample: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in dict(d_model=d_model, downsample=downsample).items():
            _checks.check_integer(name, value)
        self.d_model, self.downsample = d_model, downsample

    def build(self, input_shape: Sequence[int | None]) -> None:
        if len(input_shape) not in (4, 5):
            raise ValueError(
                f"The input of {type(self).__name__} must have the shape (b, H, W, C), or (b, T, H, W, C) for clips. "
                f"Received: shape={tuple(input_shape)}. Add the missing axis."
            )
        self.build_for_images((None, *input_shape[-3:]))

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if len(inputs.shape) == 4:
            return self.encode(inputs, training)
        shape = ops.shape(inputs)
        grids = self.encode(ops.reshape(inputs, (-1, *shape[2:])), training)
        return ops.reshape(grids, (-1, shape[1], *ops.shape(grids)[1:]))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        *before, height, width, _ = input_shape
        sides = (None if side is None else -(-side // self.downsample) for side in (height, width))
        return (*before, *sides, self.d_model)

    def get_config(self) -> Config:
        return super().get_config() | {"d_model": self.d_model, "downsample": self.downsample}

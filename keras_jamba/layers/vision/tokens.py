"""Tokens from grids of features."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import keras
from keras import ops

from keras_jamba._typing import Config, Shape, Tensor
from keras_jamba.layers import _initializers
from keras_jamba.layers._trainable import KeepsTrainable
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class GridTokens(KeepsTrainable, keras.layers.Layer):
    """One token per grid cell, row after row and frame after frame.

    Args:
        scan_order: "row", each row from left to right; or "snake", every other row from right to left, so that
            neighbours in the sequence are neighbours in the grid ([Yang et al., 2024](https://arxiv.org/abs/2403.17695)).

    Call arguments:
        inputs: `(b, H', W', d)`, or `(b, T, H', W', d)` for clips.

    Returns:
        `(b, H' * W', d)` or `(b, T * H' * W', d)`.

    Raises:
        ValueError: if the order is unknown or the inputs have another number of axes.
    """

    def __init__(self, scan_order: Literal["row", "snake"] = "row", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _checks.check_choice("scan_order", scan_order, ("row", "snake"))
        self.scan_order = scan_order

    def build(self, input_shape: Sequence[int | None]) -> None:
        _check_axes("GridTokens", input_shape, {4: "(b, H', W', d)", 5: "(b, T, H', W', d)"})

    def call(self, inputs: Tensor) -> Tensor:
        x = inputs
        if self.scan_order == "snake":
            rows = ops.arange(ops.shape(x)[-3], dtype="int32")[:, None, None]
            x = ops.where(ops.equal(ops.mod(rows, 2), 1), ops.flip(x, axis=-2), x)
        return ops.reshape(x, (-1, _product(ops.shape(x)[1:-1]), x.shape[-1]))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], _product(input_shape[1:-1]), input_shape[-1])

    def get_config(self) -> Config:
        return super().get_config() | {"scan_order": self.scan_order}


@keras.saving.register_keras_serializable(package="keras_jamba")
class FrameTokens(KeepsTrainable, keras.layers.Layer):
    """One token per frame: the mean over its cells of a dense layer applied to features and coordinates.

    The dense layer concatenates the coordinates of a cell to its features. Without coordinates the mean would lose the
    positions of features. Coordinates run from -1 to 1, from top to bottom and from left to right. Grids may have any
    size.

    Args:
        d_model: width d of a token.

    Call arguments:
        inputs: `(b, T, H', W', d)`.

    Returns:
        `(b, T, d)`.

    Raises:
        ValueError: if the inputs have another number of axes.

    Reference:
        The coordinates: [Liu et al. (2018)](https://arxiv.org/abs/1807.03247).
    """

    @_checks.python_numbers
    def __init__(self, d_model: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _checks.check_integer("d_model", d_model)
        self.d_model = d_model
        self.projection = keras.layers.Dense(
            d_model, kernel_initializer=_initializers.xavier(), name="projection", dtype=self.dtype_policy
        )

    def build(self, input_shape: Sequence[int | None]) -> None:
        _check_axes("FrameTokens", input_shape, {5: "(b, T, H', W', d)"})
        self.projection.build((*input_shape[:-1], cast(int, input_shape[-1]) + 2))

    def call(self, inputs: Tensor) -> Tensor:
        _, _, height, width, _ = shape = ops.shape(inputs)
        coordinates = ops.meshgrid(_coordinates(height), _coordinates(width), indexing="ij")
        coordinates = ops.cast(ops.stack(coordinates, axis=-1), inputs.dtype)
        coordinates = ops.broadcast_to(coordinates[None, None], (*shape[:-1], 2))
        return ops.mean(ops.silu(self.projection(ops.concatenate([inputs, coordinates], axis=-1))), axis=(2, 3))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape[:2], self.d_model)

    def get_config(self) -> Config:
        return super().get_config() | {"d_model": self.d_model}


def _check_axes(layer, shape, known):
    if len(shape) not in known:
        raise ValueError(
            f"The input of {layer} must have the shape {' or '.join(known.values())}. Received: shape={tuple(shape)}. "
            "Pass the outputs of SpatialEncoder or PatchEncoder."
        )


def _coordinates(count):
    """Returns `(count,)` float32, the centres of `count` equal intervals between -1 and 1."""
    steps = ops.arange(count, dtype="float32")
    return (2 * steps + 1) / ops.cast(count, "float32") - 1


def _product(sizes):
    if any(size is None for size in sizes):
        return None
    product = 1
    for size in sizes:
        product = product * size
    return product

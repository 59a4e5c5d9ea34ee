"""Rotary position embedding."""

import numbers

import keras
import numpy as np
from keras import ops

from keras_jamba._typing import Tensor
from keras_jamba.ops import _checks


def rotary_embedding(
    x: Tensor, positions: Tensor | int = 0, theta: float = 10000.0, interleaved: bool = True
) -> Tensor:
    """Rotates every pair of features by an angle proportional to the position.

    Pair p of a head of width c is a complex number. At position m it is multiplied by
    `exp(i * m * theta ** (-2p / c))`. Angles are float32 for every dtype of x, and accurate to 1e-4 radians at any
    position.

    Args:
        x: `(b, t, h, c)` queries or keys, c even.
        positions: integers `(b, t)`, the position of each token, below 2^31; or an integer, the position of the
            first token.
        theta: base of the frequencies.
        interleaved: True if pair p is features 2p and 2p + 1 (Su et al., 2021). False if it is features
            p and p + c/2 (GPT-NeoX, Llama in transformers).

    Returns:
        `(b, t, h, c)` in the dtype of x.

    Raises:
        ValueError: if x is not a floating-point tensor of four axes with an even last axis, or if positions are
            neither an integer nor integers `(b, t)`.

    Reference:
        [Su et al. (2021)](https://arxiv.org/abs/2104.09864), equation 34.
    """
    x = ops.convert_to_tensor(x)
    _checks.check_floating({"x": x})
    if len(x.shape) != 4 or x.shape[-1] % 2:
        raise ValueError(
            "x must have the shape (b, t, h, c) with an even head width c. "
            f"Received: x.shape={tuple(x.shape)}. Choose num_heads so that d_model / num_heads is even."
        )
    if isinstance(positions, numbers.Integral):
        positions = (ops.arange(ops.shape(x)[1], dtype="int32") + int(positions))[None]
    positions = ops.convert_to_tensor(positions)
    if len(positions.shape) != 2 or not keras.backend.is_int_dtype(positions.dtype):
        raise ValueError(
            "positions must be an integer or a tensor of integers of shape (b, t). Received: "
            f"positions.shape={tuple(positions.shape)}, dtype={positions.dtype}. Give each token its position."
        )
    angles = ops.expand_dims(_angles(positions, theta, x.shape[-1] // 2), 2)
    cos, sin = ops.cos(angles), ops.sin(angles)
    real, imaginary = _split(ops.cast(x, "float32"), interleaved)
    rotated = real * cos - imaginary * sin, real * sin + imaginary * cos
    joined = ops.stack(rotated, axis=-1) if interleaved else ops.concatenate(rotated, axis=-1)
    return ops.cast(ops.reshape(joined, ops.shape(x)), x.dtype)


def _angles(positions, theta, half):
    """Returns `(b, t, half)` float32: `positions * theta ** (-p / half)` for pair p, modulo 2 pi.

    The angle is summed over the base-256 digits of the position. The float32 product would be off by 0.004 radians at
    position 100,000 and by half a radian at 10 million.
    """
    frequencies = float(theta) ** -(np.arange(half) / half)
    angles = 0.0
    for digit in range(4):
        turns = frequencies * 256**digit / (2 * np.pi)
        step = ops.convert_to_tensor((2 * np.pi * (turns - np.round(turns))).astype("float32"))
        digits = ops.mod(ops.floor_divide(positions, 256**digit), 256)
        angles = angles + ops.expand_dims(ops.cast(digits, "float32"), -1) * step
    return angles


def _split(x, interleaved):
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    return ops.split(x, 2, axis=-1)

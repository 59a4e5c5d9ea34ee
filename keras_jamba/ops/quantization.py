"""Quantized matrices, int8 or int4, and products with them."""

import math
from typing import NamedTuple

import numpy as np
from keras import ops, quantizers

from keras_jamba import _backend
from keras_jamba._typing import Tensor
from keras_jamba.ops._repeat import repeated

# Rows of an int4 matrix that share a scale.
GROUP = 64
_LEVELS = (-8, 7)
# Numbers that are rounded at a time.
_BLOCK = 2**21


class QuantizedTensor(NamedTuple):
    """Quantized matrix `(d, f)`, or stack of matrices `(..., d, f)`.

    Attributes:
        values: int8. For int8 `(..., d, f)`; for int4 `(..., d, ceil(f / 2))`, two columns per byte.
        scale: float32. For int8 `(..., f)`, one divisor of the values per column; for int4 `(..., groups, f)`, one
            factor per group of rows and column.
        zero: None for int8. For int4 int8 `(..., groups, f)`, the value that represents zero.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.scale.shape[-1])


def storage_specs(shape, mode):
    """Returns `{suffix: (shape, dtype)}` of the tensors that store a matrix of this shape; mode "int8" or "int4"."""
    *stack, rows, columns = shape
    if mode == "int8":
        return {"": (tuple(shape), "int8"), "_scale": ((*stack, columns), "float32")}
    groups = (*stack, math.ceil(rows / GROUP), columns)
    packed = (*stack, rows, math.ceil(columns / 2))
    return {"": (packed, "int8"), "_scale": (groups, "float32"), "_zero": (groups, "int8")}


def quantized(x, mode):
    """Returns NumPy arrays `{suffix: array}` that store a matrix or a stack `(..., d, f)`, rounded to nearest.

    int8: each column has levels -127 to 127, scaled to its largest absolute value. int4: each `GROUP` rows of a column
    have 16 levels from their smallest to their largest value; zero is a level.
    """
    x = np.asarray(x)
    found = [_rounded_in_blocks(matrix, mode) for matrix in x.reshape(-1, *x.shape[-2:])]
    return {
        name: np.stack([each[name] for each in found]).reshape(*x.shape[:-2], *array.shape)
        for name, array in found[0].items()
    }


def _rounded_in_blocks(x, mode):
    """Returns `_rounded` of a matrix. It rounds some columns at a time, because rounding makes several copies."""
    # int4 stores pairs of columns.
    columns = max(_BLOCK // max(len(x), 1) // 2 * 2, 2)
    begins = range(0, max(x.shape[1], 1), columns)
    parts = [_rounded(np.asarray(x[:, begin : begin + columns], "float32"), mode) for begin in begins]
    return {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}


def _rounded(x, mode):
    if mode == "int8":
        values, scale = quantizers.abs_max_quantize(x, axis=0, to_numpy=True)
        return {"": _host(values), "_scale": _host(scale)[0]}
    found = quantizers.abs_max_quantize_grouped_with_zero_point(x, block_size=GROUP, value_range=_LEVELS, to_numpy=True)
    values, scale, zero = map(_host, found)
    # Two columns per byte, the even column in the lower half.
    values = np.pad(values, ((0, 0), (0, values.shape[-1] % 2)))
    return {"": ((values[:, ::2] & 15) | (values[:, 1::2] << 4)).astype("int8"), "_scale": scale, "_zero": zero}


def _host(x):
    return np.asarray(ops.convert_to_numpy(x))


def dequantized(x, dtype):
    """Returns the matrix of a `QuantizedTensor` in `dtype`; other tensors are returned unchanged."""
    if not isinstance(x, QuantizedTensor):
        return x
    if x.zero is None:
        return ops.cast(ops.cast(x.values, "float32") / x.scale[..., None, :], dtype)
    rows = x.values.shape[-2]
    spread = lambda y: repeated(ops.cast(y, "float32"), GROUP, axis=-2)[..., :rows, :]  # noqa: E731
    values = ops.cast(_unpacked(x.values, x.scale.shape[-1]), "float32")
    return ops.cast((values - spread(x.zero)) * spread(x.scale), dtype)


def _unpacked(values, columns):
    # An arithmetic right shift extends the sign.
    halves = ops.stack([ops.right_shift(ops.left_shift(values, 4), 4), ops.right_shift(values, 4)], axis=-1)
    return ops.reshape(halves, (*values.shape[:-1], -1))[..., :columns]


def picked(x, indices, dtype):
    """Returns the matrices of a stack at `indices`, dequantized to `dtype`; the others stay quantized."""
    if not isinstance(x, QuantizedTensor):
        return ops.take(x, indices, axis=0)
    return dequantized(
        QuantizedTensor(*(None if part is None else ops.take(part, indices, axis=0) for part in x)), dtype
    )


def product(x, matrix):
    """Returns `x @ matrix`, for `(..., d)` and `(d, f)`, in the dtype of `x`.

    Only `x` has a gradient if the matrix is quantized. For int8 the scale is applied to the product, not to the matrix.
    """
    if _backend.decoding.applies(x) and not _is_int4(matrix):
        found = _backend.decoding.product(x, *_values_and_divisor(matrix))
        if found is not None:
            return found
    if not isinstance(matrix, QuantizedTensor):
        return _backend.numerics.matmul(x, matrix)
    if matrix.zero is not None:
        return ops.matmul(x, dequantized(matrix, x.dtype))
    y = ops.matmul(x, ops.cast(matrix.values, x.dtype))
    return ops.cast(ops.cast(y, "float32") / matrix.scale, x.dtype)


def gated_product(x, gate, up):
    """Returns `silu(x @ gate) * (x @ up)` from one kernel for few rows, or None if there is none; see `product`."""
    if _is_int4(gate) or _is_int4(up):
        return None
    (gate_values, gate_divisor), (up_values, up_divisor) = map(_values_and_divisor, (gate, up))
    return _backend.decoding.gated_product(x, gate_values, up_values, gate_divisor, up_divisor)


def _is_int4(matrix):
    return isinstance(matrix, QuantizedTensor) and matrix.zero is not None


def _values_and_divisor(matrix):
    return (matrix.values, matrix.scale) if isinstance(matrix, QuantizedTensor) else (matrix, None)

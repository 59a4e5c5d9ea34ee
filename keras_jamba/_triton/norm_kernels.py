"""Kernels of RMSNorm, several rows per tile. Sums are in float32."""

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    x,
    scale,
    y,
    inverse,
    rows,
    ROW: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Computes `y = x * inverse * scale` `(rows, D)`, with `inverse = 1 / sqrt(mean(x * x) + EPSILON)` `(rows,)`.

    ROW is the row stride of x in elements.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.arange(0, BN)
    there = (row < rows)[:, None] & (column < D)[None, :]
    place = row.to(tl.int64)[:, None]
    values = tl.load(x + place * ROW + column[None, :], mask=there, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, 1) / D + EPSILON)
    weight = tl.load(scale + column, mask=column < D, other=0.0).to(tl.float32)
    result = values * factor[:, None] * weight[None, :]
    tl.store(y + place * D + column[None, :], result.to(y.dtype.element_ty), mask=there)
    tl.store(inverse + row, factor, mask=row < rows)


@triton.jit
def norm_backward(
    grad_y,
    x,
    scale,
    inverse,
    grad_x,
    grad_scale,
    rows,
    ROW: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Computes `grad_x` `(rows, D)`, and one row of `grad_scale` `(programs, D)` per program, whose sum is wanted.

    A program takes every `programs`-th tile of rows.
    """
    column = tl.arange(0, BN)
    weight = tl.load(scale + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for first in range(tl.program_id(0) * BM, rows, tl.num_programs(0) * BM):
        row = first + tl.arange(0, BM)
        there = (row < rows)[:, None] & (column < D)[None, :]
        place = row.to(tl.int64)[:, None]
        factor = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(x + place * ROW + column[None, :], mask=there, other=0.0).to(tl.float32) * factor
        gradient = tl.load(grad_y + place * D + column[None, :], mask=there, other=0.0).to(tl.float32)
        total += tl.sum(gradient * normed, 0)
        gradient *= weight[None, :]
        gradient = (gradient - normed * (tl.sum(gradient * normed, 1) / D)[:, None]) * factor
        tl.store(grad_x + place * D + column[None, :], gradient.to(grad_x.dtype.element_ty), mask=there)
    tl.store(grad_scale + tl.program_id(0) * D + column, total, mask=column < D)

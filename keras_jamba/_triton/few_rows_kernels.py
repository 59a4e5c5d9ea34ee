"""Kernels for few tokens, in Triton: forward only.

The time of a matrix product with few rows is that of reading the matrix. A program reads BN columns of it.
"""

# Triton compiles these functions, and its types are not those of Python.
# mypy: ignore-errors

import triton
import triton.language as tl

from keras_jamba._triton.function_kernels import _let_next_start, _sigmoid, _wait_for_inputs


@triton.jit
def _block(matrix, begin, n, K: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    """Returns the rows `begin` to `begin + BK` and the columns n of a matrix `(K, N)`."""
    k = begin + tl.arange(0, BK)
    place = k[:, None].to(tl.int64) * N + n[None, :]
    return tl.load(matrix + place, mask=(k < K)[:, None] & (n < N)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def _added(
    total,
    gates,
    x,
    values,
    gate_values,
    begin,
    r,
    rows,
    X_ROW: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
):
    """Adds the products with a block of the matrix, and with one of the gate's if GATED, to the sums."""
    k = begin + tl.arange(0, BK)
    if BM == 1:
        factor = tl.load(x + k, mask=k < K, other=0).to(tl.float32)[:, None]
        total += factor * values.to(tl.float32)
        if GATED:
            gates += factor * gate_values.to(tl.float32)
    else:
        factors = tl.load(x + r[:, None] * X_ROW + k[None, :], mask=(r < rows)[:, None] & (k < K)[None, :], other=0)
        total = tl.dot(factors, values.to(factors.dtype), total)
        if GATED:
            gates = tl.dot(factors, gate_values.to(factors.dtype), gates)
    return total, gates


@triton.jit
def product(
    x,
    matrix,
    gate,
    divisor,
    gate_divisor,
    y,
    rows,
    X_ROW: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    DIVIDED: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Computes `x @ matrix`, or `silu(x @ gate) * (x @ matrix)`, for `x (rows, K)` and `(K, N)`.

    X_ROW is the row stride of x. STEPS blocks of BK terms cover K. BM is 1, or at least 16 and `rows`. The results are
    divided by `divisor (N,)`, if DIVIDED.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, BM)
    ok, there = n < N, r < rows
    if BM == 1:
        total = tl.zeros([BK, BN], tl.float32)
        gates = tl.zeros([BK, BN], tl.float32)
    else:
        total = tl.zeros([BM, BN], tl.float32)
        gates = tl.zeros([BM, BN], tl.float32)
    values = _block(matrix, 0, n, K, N, BK)
    if GATED:
        gate_values = _block(gate, 0, n, K, N, BK)
    else:
        gate_values = values
    _wait_for_inputs(OVERLAPS)
    total, gates = _added(total, gates, x, values, gate_values, 0, r, rows, X_ROW, K, BM, BK, GATED)
    for i in tl.range(1, STEPS, num_stages=STAGES):
        begin = i * BK
        values = _block(matrix, begin, n, K, N, BK)
        if GATED:
            gate_values = _block(gate, begin, n, K, N, BK)
        total, gates = _added(total, gates, x, values, gate_values, begin, r, rows, X_ROW, K, BM, BK, GATED)
    _let_next_start(OVERLAPS)
    if BM == 1:
        total = tl.sum(total, 0)[None, :]
        gates = tl.sum(gates, 0)[None, :]
    if DIVIDED:
        total /= tl.load(divisor + n, mask=ok, other=1.0)[None, :]
    if GATED:
        if DIVIDED:
            gates /= tl.load(gate_divisor + n, mask=ok, other=1.0)[None, :]
        # Rounded as the products of a library are.
        gates = gates.to(y.dtype.element_ty).to(tl.float32)
        total = total.to(y.dtype.element_ty).to(tl.float32) * gates * _sigmoid(gates)
    tl.store(y + r[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=there[:, None] & ok[None, :])


@triton.jit
def added_norm(
    x,
    other,
    scale,
    y,
    total,
    D: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    EPSILON: tl.constexpr,
    BN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Computes `total = x + other` and its norm `y`, a row `(D,)` per program; without `other`, the norm of x."""
    place = tl.program_id(0).to(tl.int64) * D + tl.arange(0, BN)
    n = tl.arange(0, BN)
    ok = n < D
    weight = tl.load(scale + n, mask=ok, other=0).to(tl.float32)
    _wait_for_inputs(OVERLAPS)
    values = tl.load(x + place, mask=ok, other=0).to(tl.float32)
    if HAS_OTHER:
        values += tl.load(other + place, mask=ok, other=0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=ok)
        values = rounded.to(tl.float32)
    _let_next_start(OVERLAPS)
    factor = tl.rsqrt(tl.sum(values * values, 0) / D + EPSILON)
    tl.store(y + place, (values * factor * weight).to(y.dtype.element_ty), mask=ok)


@triton.jit
def norms_of_slices(
    x,
    first_scale,
    second_scale,
    third_scale,
    y,
    X_ROW: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WIDTH: tl.constexpr,
    EPSILON: tl.constexpr,
    BN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Normalises three slices of each row of `x (rows, WIDTH)`, which end at FIRST, SECOND and WIDTH."""
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    in_first, in_second, in_third = n < FIRST, (n >= FIRST) & (n < SECOND), (n >= SECOND) & (n < WIDTH)
    first_weight = tl.load(first_scale + n, mask=in_first, other=0).to(tl.float32)
    second_weight = tl.load(second_scale + n - FIRST, mask=in_second, other=0).to(tl.float32)
    third_weight = tl.load(third_scale + n - SECOND, mask=in_third, other=0).to(tl.float32)
    _wait_for_inputs(OVERLAPS)
    values = tl.load(x + row * X_ROW + n, mask=n < WIDTH, other=0).to(tl.float32)
    _let_next_start(OVERLAPS)
    squares = values * values
    first = tl.rsqrt(tl.sum(tl.where(in_first, squares, 0.0), 0) / FIRST + EPSILON)
    second = tl.rsqrt(tl.sum(tl.where(in_second, squares, 0.0), 0) / (SECOND - FIRST) + EPSILON)
    third = tl.rsqrt(tl.sum(tl.where(in_third, squares, 0.0), 0) / (WIDTH - SECOND) + EPSILON)
    factor = first_weight * first + second_weight * second + third_weight * third
    tl.store(y + row * WIDTH + n, (values * factor).to(y.dtype.element_ty), mask=n < WIDTH)


@triton.jit
def convolution_step(
    x,
    kernel,
    bias,
    state,
    y,
    after,
    X_ROW: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Computes one token of the convolution, `y (b, E)`, and the next state `after (b, W - 1, E)`.

    `x`: `(b, E)` with the row stride X_ROW; `kernel`: `(W, E)`; `state`: `(b, W - 1, E)`, the inputs before x.
    """
    b, e = tl.program_id(1).to(tl.int64), tl.program_id(0) * BN + tl.arange(0, BN)
    ok = e < E
    factor = tl.load(kernel + (W - 1) * E + e, mask=ok, other=0).to(tl.float32)
    shift = tl.load(bias + e, mask=ok, other=0).to(tl.float32) if HAS_BIAS else tl.zeros([BN], tl.float32)
    _wait_for_inputs(OVERLAPS)
    new = tl.load(x + b * X_ROW + e, mask=ok, other=0)
    total = new.to(tl.float32) * factor + shift
    for i in tl.static_range(W - 1):
        before = tl.load(state + (b * (W - 1) + i) * E + e, mask=ok, other=0)
        total += before.to(tl.float32) * tl.load(kernel + i * E + e, mask=ok, other=0).to(tl.float32)
        if i > 0:
            tl.store(after + (b * (W - 1) + i - 1) * E + e, before, mask=ok)
    tl.store(after + (b * (W - 1) + W - 2) * E + e, new, mask=ok)
    _let_next_start(OVERLAPS)
    if SILU:
        total *= _sigmoid(total)
    tl.store(y + b * E + e, total.to(y.dtype.element_ty), mask=ok)

"""Kernels for rows sorted by expert: products with the experts' matrices, and the steps between the products.

The rows of consecutive experts are contiguous; `counts` is the number of rows per expert. The grid holds the most tiles
that any routing needs, and programs without work end at once, so the host never waits for the counts. Programs process
an expert's tiles in strips of STRIP row tiles, so the data of a strip stays in the cache.
"""

import triton
import triton.language as tl

# A float32 product as three tf32 products, with nearly the accuracy of float32.
_SINGLE = tl.constexpr("tf32x3")


@triton.jit
def _experts_of(counts, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr):
    expert = tl.arange(0, EXPERTS_PADDED)
    return expert, tl.load(counts + expert, mask=expert < EXPERTS, other=0)


@triton.jit
def _tile_of_rows(
    program,
    counts,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    BM: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Returns a program's expert, the first row of its tile, the end of the expert's rows, and its tile of columns.

    The expert is EXPERTS or more for a program without work.
    """
    each, count = _experts_of(counts, EXPERTS, EXPERTS_PADDED)
    tiles = (count + BM - 1) // BM
    expert = tl.sum((tl.cumsum(tiles, 0) * COLUMN_TILES <= program).to(tl.int32), 0)
    before = each < expert
    mine = tl.sum(tl.where(each == expert, tiles, 0), 0)
    row = tl.sum(tl.where(before, count, 0), 0)
    end = row + tl.sum(tl.where(each == expert, count, 0), 0)
    place = program - tl.sum(tl.where(before, tiles, 0), 0) * COLUMN_TILES
    strip, place = place // (STRIP * COLUMN_TILES), place % (STRIP * COLUMN_TILES)
    width = tl.maximum(tl.minimum(mine - strip * STRIP, STRIP), 1)
    return expert, row + (strip * STRIP + place % width) * BM, end, place // width


@triton.jit
def _loaded(pointers, rows, columns, ROWS_FIT: tl.constexpr, COLUMNS_FIT: tl.constexpr):
    """Loads a tile, with zeros for rows and columns past the end; omits a mask that is always true."""
    if ROWS_FIT and COLUMNS_FIT:
        return tl.load(pointers)
    elif ROWS_FIT:
        return tl.load(pointers, mask=columns[None, :], other=0.0)
    elif COLUMNS_FIT:
        return tl.load(pointers, mask=rows[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0)


@triton.jit
def _product(
    total, a, b, columns, K: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Adds the product of the tiles at `a` `(BM, K)` and `b` `(K, BN)` to `total`.

    Columns from N on are past the end of `b`. STEP is the row stride of `b` in elements.
    """
    inner = tl.arange(0, BK)
    for k in range(0, K, BK):
        left = inner < K - k
        x = _loaded(a, left, left, True, K % BK == 0)
        y = _loaded(b, left, columns < N, K % BK == 0, N % BN == 0)
        total = tl.dot(x, y, total, input_precision=_SINGLE)
        a += BK
        b += BK * STEP
    return total


@triton.jit
def first_product(
    x,
    source,
    counts,
    up_bank,
    gate_bank,
    hidden,
    up,
    gate,
    K: tl.constexpr,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    GATED: tl.constexpr,
    GATHERED: tl.constexpr,
    KEPT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Computes `hidden`, the first layer of the experts, for the rows of `x` at `source`.

    `silu(x @ gate) * (x @ up)`, or `gelu(x @ up)` without GATED. With KEPT, stores the products too.
    """
    expert, row, end, tile = _tile_of_rows(tl.program_id(0), counts, EXPERTS, EXPERTS_PADDED, tl.cdiv(N, BN), BM, STRIP)
    if expert >= EXPERTS:
        return
    rows = row + tl.arange(0, BM)
    columns = tile * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    from_row = tl.minimum(rows, end - 1)
    if GATHERED:
        from_row = tl.load(source + from_row)
    a = x + from_row.to(tl.int64)[:, None] * K + inner[None, :]
    b = expert.to(tl.int64) * (K * N) + inner[:, None] * N + columns[None, :]
    up_b = up_bank + b
    up_sum = tl.zeros((BM, BN), tl.float32)
    if GATED:
        gate_b = gate_bank + b
        gate_sum = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            left = inner < K - k
            given = _loaded(a, left, left, True, K % BK == 0)
            up_weight = _loaded(up_b, left, columns < N, K % BK == 0, N % BN == 0)
            gate_weight = _loaded(gate_b, left, columns < N, K % BK == 0, N % BN == 0)
            up_sum = tl.dot(given, up_weight, up_sum, input_precision=_SINGLE)
            gate_sum = tl.dot(given, gate_weight, gate_sum, input_precision=_SINGLE)
            a += BK
            up_b += BK * N
            gate_b += BK * N
        result = gate_sum * tl.sigmoid(gate_sum) * up_sum
    else:
        up_sum = _product(up_sum, a, up_b, columns, K, N, N, BN, BK)
        result = 0.5 * up_sum * (1 + tl.erf(up_sum * 0.7071067811865476))
    to = rows.to(tl.int64)[:, None] * N + columns[None, :]
    there = (rows < end)[:, None] & (columns < N)[None, :]
    tl.store(hidden + to, result.to(hidden.dtype.element_ty), mask=there)
    if KEPT:
        tl.store(up + to, up_sum.to(up.dtype.element_ty), mask=there)
        if GATED:
            tl.store(gate + to, gate_sum.to(gate.dtype.element_ty), mask=there)


@triton.jit
def rows_product(
    x,
    bank,
    other_x,
    other_bank,
    source,
    target,
    scale,
    counts,
    y,
    K: tl.constexpr,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TRANSPOSE_RHS: tl.constexpr,
    TWO: tl.constexpr,
    GATHERED: tl.constexpr,
    SCATTERED: tl.constexpr,
    SCALED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Computes `y`, rows of `x` times the matrix of their expert: `(K, N)`, or with TRANSPOSE_RHS `(N, K)` transposed.

    TWO adds the product of `other_x` and `other_bank`. GATHERED reads the rows of `x` at `source`. SCATTERED writes
    the rows of `y` at `target`, and SCALED then multiplies each by its element of `scale`.
    """
    expert, row, end, tile = _tile_of_rows(tl.program_id(0), counts, EXPERTS, EXPERTS_PADDED, tl.cdiv(N, BN), BM, STRIP)
    if expert >= EXPERTS:
        return
    rows = row + tl.arange(0, BM)
    columns = tile * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    inside = tl.minimum(rows, end - 1)
    from_row = inside
    if GATHERED:
        from_row = tl.load(source + inside)
    a = from_row.to(tl.int64)[:, None] * K + inner[None, :]
    b = expert.to(tl.int64) * (K * N)
    if TRANSPOSE_RHS:
        b += columns.to(tl.int64)[None, :] * K + inner[:, None]
    else:
        b += inner[:, None] * N + columns[None, :]
    STEP: tl.constexpr = 1 if TRANSPOSE_RHS else N
    total = tl.zeros((BM, BN), tl.float32)
    total = _product(total, x + a, bank + b, columns, K, STEP, N, BN, BK)
    if TWO:
        total = _product(total, other_x + a, other_bank + b, columns, K, STEP, N, BN, BK)
    to = rows
    if SCATTERED:
        to = tl.load(target + inside)
        if SCALED:
            total *= tl.load(scale + to).to(tl.float32)[:, None]
    there = (rows < end)[:, None] & (columns < N)[None, :]
    tl.store(y + to.to(tl.int64)[:, None] * N + columns[None, :], total.to(y.dtype.element_ty), mask=there)


@triton.jit
def bank_gradient(
    a,
    b,
    a_source,
    b_source,
    counts,
    y,
    M: tl.constexpr,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    A_GATHERED: tl.constexpr,
    B_GATHERED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STRIP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Computes `y[split, expert]` `(M, N)`: the transposed rows of `a` times the rows of `b`, summed over rows.

    Split i of SPLITS sums every SPLITS-th group of BK rows of the expert, from group i on.
    """
    ROW_TILES: tl.constexpr = (M + BM - 1) // BM
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    expert = tl.program_id(0) // (ROW_TILES * COLUMN_TILES)
    place = tl.program_id(0) % (ROW_TILES * COLUMN_TILES)
    strip, place = place // (STRIP * COLUMN_TILES), place % (STRIP * COLUMN_TILES)
    width = tl.minimum(ROW_TILES - strip * STRIP, STRIP)
    i = (strip * STRIP + place % width) * BM + tl.arange(0, BM)
    j = (place // width) * BN + tl.arange(0, BN)
    each, count = _experts_of(counts, EXPERTS, EXPERTS_PADDED)
    start = tl.sum(tl.where(each < expert, count, 0), 0)
    end = start + tl.sum(tl.where(each == expert, count, 0), 0)
    split = tl.program_id(1)
    inner = split * BK + tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    if A_GATHERED or B_GATHERED:
        for first in range(start, end - split * BK, SPLITS * BK):
            rows = first + inner
            there = rows < end
            a_row = rows
            b_row = rows
            if A_GATHERED:
                a_row = tl.load(a_source + rows, mask=there, other=0)
            if B_GATHERED:
                b_row = tl.load(b_source + rows, mask=there, other=0)
            x = _loaded(a + a_row.to(tl.int64)[None, :] * M + i[:, None], i < M, there, M % BM == 0, False)
            w = _loaded(b + b_row.to(tl.int64)[:, None] * N + j[None, :], there, j < N, False, N % BN == 0)
            total = tl.dot(x, w, total, input_precision=_SINGLE)
    else:
        a += start.to(tl.int64) * M + inner[None, :] * M + i[:, None]
        b += start.to(tl.int64) * N + inner[:, None] * N + j[None, :]
        for first in range(0, end - start - split * BK, SPLITS * BK):
            there = inner < end - start - first
            x = _loaded(a, i < M, there, M % BM == 0, False)
            w = _loaded(b, there, j < N, False, N % BN == 0)
            total = tl.dot(x, w, total, input_precision=_SINGLE)
            a += SPLITS * BK * M
            b += SPLITS * BK * N
    to = (split * EXPERTS + expert).to(tl.int64) * (M * N) + i.to(tl.int64)[:, None] * N + j[None, :]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=(i < M)[:, None] & (j < N)[None, :])


@triton.jit
def activation(up, gate, hidden, N: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr):
    """Computes `hidden`, one row per program: `silu(gate) * up`, or `gelu(up)` without GATED."""
    start = tl.program_id(0).to(tl.int64) * N
    for first in range(0, N, BN):
        columns = first + tl.arange(0, BN)
        there = columns < N
        u = tl.load(up + start + columns, mask=there, other=0.0).to(tl.float32)
        if GATED:
            g = tl.load(gate + start + columns, mask=there, other=0.0).to(tl.float32)
            result = g * tl.sigmoid(g) * u
        else:
            result = 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))
        tl.store(hidden + start + columns, result.to(hidden.dtype.element_ty), mask=there)


@triton.jit
def activation_gradient(
    gradient,
    up,
    gate,
    scale,
    target,
    grad_up,
    grad_gate,
    hidden,
    grad_scale,
    N: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BN: tl.constexpr,
):
    """Computes the gradients of an activation, one row per program.

    With WEIGHTED, `gradient` is that of `hidden`, which is the activation times the weight `scale[target[row]]`. The
    outputs are the gradients of `up`, `gate` and the weight, and `hidden`. Else only those of `up` and `gate`.
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * N
    weight, to = 1.0, 0
    if WEIGHTED:
        to = tl.load(target + row)
        weight = tl.load(scale + to).to(tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, N, BN):
        columns = first + tl.arange(0, BN)
        there = columns < N
        d = tl.load(gradient + start + columns, mask=there, other=0.0).to(tl.float32)
        u = tl.load(up + start + columns, mask=there, other=0.0).to(tl.float32)
        if GATED:
            g = tl.load(gate + start + columns, mask=there, other=0.0).to(tl.float32)
            opened = tl.sigmoid(g)
            h = g * opened * u
            d_up = d * g * opened
            d_gate = d * u * opened * (1 + g * (1 - opened))
            tl.store(grad_gate + start + columns, (weight * d_gate).to(grad_gate.dtype.element_ty), mask=there)
        else:
            below = 0.5 * (1 + tl.erf(u * 0.7071067811865476))
            h = u * below
            d_up = d * (below + u * 0.3989422804014327 * tl.exp(-0.5 * u * u))
        tl.store(grad_up + start + columns, (weight * d_up).to(grad_up.dtype.element_ty), mask=there)
        if WEIGHTED:
            tl.store(hidden + start + columns, (weight * h).to(hidden.dtype.element_ty), mask=there)
            total += d * h
    if WEIGHTED:
        tl.store(grad_scale + to, tl.sum(total, 0).to(grad_scale.dtype.element_ty))


@triton.jit
def combination(
    x,
    other_x,
    place,
    scale,
    y,
    D: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SCALED: tl.constexpr,
    TWO: tl.constexpr,
    BN: tl.constexpr,
):
    """Computes `y`, one token per program: the sum of the rows of `x` at `place`, weighted by `scale` with SCALED.

    TWO adds the rows of `other_x` to those of `x` first.
    """
    token = tl.program_id(0)
    for first in range(0, D, BN):
        columns = first + tl.arange(0, BN)
        there = columns < D
        total = tl.zeros((BN,), tl.float32)
        for i in tl.static_range(PER_TOKEN):
            row = tl.load(place + token * PER_TOKEN + i).to(tl.int64)
            part = tl.load(x + row * D + columns, mask=there, other=0.0).to(tl.float32)
            if TWO:
                part += tl.load(other_x + row * D + columns, mask=there, other=0.0).to(tl.float32)
            if SCALED:
                part *= tl.load(scale + token * PER_TOKEN + i).to(tl.float32)
            total += part
        tl.store(y + token.to(tl.int64) * D + columns, total.to(y.dtype.element_ty), mask=there)

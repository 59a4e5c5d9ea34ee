"""Launches of the kernels for few tokens. They have no gradient.

On Hopper and later GPUs, each kernel starts while the last one still runs, and reads its weights meanwhile.
"""

from typing import NamedTuple

from keras_jamba._triton.tuning import power

MOST_ROWS = 16
# The widest row of a norm that one program holds.
WIDEST = 8192


class Plan(NamedTuple):
    """Block of `terms` by `columns` of the matrix per step, warps, and the depth of the software pipeline."""

    terms: int
    columns: int
    warps: int
    stages: int


def product(gpu, x, row, matrix, gate=None, divisor=None, gate_divisor=None, plan=None):
    """Returns `x @ matrix` in the dtype of x, or `silu(x @ gate) * (x @ matrix)`.

    Args:
        gpu: a `Gpu`.
        x: `(rows, k)`, at most MOST_ROWS rows, with contiguous rows.
        row: the row stride of x in elements.
        matrix, gate: `(k, n)`, contiguous, in the dtype of x or int8; gate may be None.
        divisor, gate_divisor: `(n,)` float32 or None, by which the products are divided.
        plan: a `Plan`, or None for the usual one.
    """
    (rows, k), n = x.shape, matrix.shape[1]
    plan = plan or plan_for(rows, *matrix.shape, gate is not None, divisor is not None)
    constants = dict(rows=rows, X_ROW=row, K=k, N=n, STEPS=-(-k // plan.terms), BM=1 if rows == 1 else MOST_ROWS)
    constants |= dict(BK=plan.terms, BN=plan.columns, STAGES=plan.stages)
    constants |= dict(GATED=gate is not None, DIVIDED=divisor is not None)
    gate = matrix if gate is None else gate
    inputs = (x, matrix, gate, x if divisor is None else divisor, x if gate_divisor is None else gate_divisor)
    outputs, grid = [((rows, n), x.dtype)], (-(-n // plan.columns),)
    return run(gpu, _kernels().product, grid, inputs, outputs, constants, plan.warps, (matrix, gate))[0]


def plan_for(rows, k, n, gated, is_int8=False):
    """Returns the `Plan` of a product, measured on an H200."""
    if k <= 512:
        return Plan(64, 16, 4, 1) if rows == 1 else Plan(64, 32, 4, 3)
    if n <= 1024:
        return Plan(256, 16, 4, 3) if rows == 1 else Plan(128, 16, 4, 4)
    if rows > 1:
        if gated:
            return Plan(64, 64, 2, 6)
        return Plan(128, 64, 4, 4) if n > 4096 else Plan(128, 32, 2, 6)
    if is_int8:
        return Plan(128, 32, 2, 6) if gated or n > 4096 else Plan(512, 32, 8, 4)
    if gated:
        return Plan(256, 32, 8, 3)
    return Plan(256, 64, 8, 3) if n > 4096 else Plan(512, 32, 8, 3)


def added_norm(gpu, x, scale, epsilon, other=None):
    """Returns `(x + other, RMSNorm of that)` for contiguous `(rows, d)`; without `other`, `(x, RMSNorm of x)`."""
    rows, d = x.shape
    constants = dict(D=d, HAS_OTHER=other is not None, EPSILON=epsilon, BN=power(d))
    given = (x, x if other is None else other, scale)
    outputs = [(x.shape, x.dtype), ((1,) if other is None else x.shape, x.dtype)]
    warps = 8 if d > 2048 else 4
    y, total = run(gpu, _kernels().added_norm, (rows,), given, outputs, constants, warps, (scale,))
    return (x if other is None else total), y


def norms_of_slices(gpu, x, row, scales, epsilon):
    """Returns `(rows, d)` with RMSNorm in three slices of each row, whose widths are the sizes of the `scales`."""
    rows, width = x.shape
    first, second, _ = (scale.shape[0] for scale in scales)
    constants = dict(X_ROW=row, FIRST=first, SECOND=first + second, WIDTH=width, EPSILON=epsilon, BN=power(width))
    outputs, warps = [((rows, width), x.dtype)], 1 if width <= 512 else 4
    return run(gpu, _kernels().norms_of_slices, (rows,), (x, *scales), outputs, constants, warps, scales)[0]


def convolution_step(gpu, x, row, kernel, bias, state, silu, into=None):
    """Computes one token of the causal depthwise convolution.

    Args:
        gpu: a `Gpu`.
        x: `(b, e)` with contiguous rows.
        row: the row stride of x in elements.
        kernel: `(w, e)`, w of at least 2.
        bias: `(e,)` or None.
        state: `(b, w - 1, e)`, the inputs before x, contiguous and in the dtype of x.
        silu: whether to apply SiLU to the result.
        into: `{1: array}`, an array for the next state, which may be that of this step; or None.

    Returns:
        y `(b, e)` in the dtype of x, and the next state.
    """
    (b, e), width = x.shape, kernel.shape[0]
    constants = dict(X_ROW=row, E=e, W=width, HAS_BIAS=bias is not None, SILU=silu, BN=256)
    inputs = (x, kernel, kernel if bias is None else bias, state)
    outputs = [((b, e), x.dtype), (state.shape, state.dtype)]
    grid = (-(-e // 256), b)
    weights = (kernel,) if bias is None else (kernel, bias)
    return run(gpu, _kernels().convolution_step, grid, inputs, outputs, constants, 2, weights, into)


def run(gpu, kernel, grid, inputs, outputs, constants, warps, weights, into=None):
    """Launches a kernel. If all `weights` are constant, it reads them while the last kernel still runs.

    `into` are arrays for outputs by index, or None.
    """
    overlaps = gpu.overlaps(weights)
    constants = constants | dict(OVERLAPS=overlaps)
    more = dict(overlaps=True) if overlaps else {}
    more |= dict(into=into) if into else {}
    return gpu.launch(kernel, grid, inputs, outputs, constants, num_warps=warps, num_stages=1, **more)


def _kernels():
    # Imported lazily: Triton may be missing.
    from keras_jamba._triton import few_rows_kernels

    return few_rows_kernels

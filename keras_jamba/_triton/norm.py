"""Launches of the RMSNorm kernels."""

from keras_jamba._triton.tuning import power

# Elements per tile. Each program of the gradient keeps a sum over its rows, so that programs are few.
_ELEMENTS, _PROGRAMS_PER_MULTIPROCESSOR = 2048, 4


def forward(gpu, x, row, scale, epsilon):
    """Normalises rows.

    Args:
        gpu: a `Gpu`.
        x: `(..., d)` with a constant row stride and contiguous rows. A program holds complete rows: d is small.
        row: the row stride of x in elements.
        scale: `(d,)`, contiguous.
        epsilon: number added to the mean square.

    Returns:
        `(y, inverse)`: y has the shape and dtype of x. The inverse root of each row's mean square is `(rows,)` float32.
    """
    rows, constants, warps = _tiles(x, row)
    outputs = [(x.shape, x.dtype), ((rows,), "float32")]
    constants |= dict(rows=rows, EPSILON=epsilon)
    grid = (-(-rows // constants["BM"]),)
    return gpu.launch(_kernels().norm_forward, grid, (x, scale), outputs, constants, num_warps=warps, num_stages=1)


def gradients(gpu, grad_y, x, row, scale, inverse):
    """Returns the gradients of x and of scale, the latter float32. `grad_y` is contiguous; see `forward`."""
    rows, constants, warps = _tiles(x, row)
    programs = min(-(-rows // constants["BM"]), _PROGRAMS_PER_MULTIPROCESSOR * gpu.multiprocessors)
    outputs = [(x.shape, x.dtype), ((programs, x.shape[-1]), "float32")]
    inputs = (grad_y, x, scale, inverse)
    constants |= dict(rows=rows)
    kernel = _kernels().norm_backward
    grad_x, sums = gpu.launch(kernel, (programs,), inputs, outputs, constants, num_warps=warps, num_stages=1)
    return grad_x, sums.sum(0)


def _tiles(x, row):
    rows, width = 1, x.shape[-1]
    for size in x.shape[:-1]:
        rows *= size
    columns = power(width)
    elements = max(_ELEMENTS, columns)
    return rows, dict(ROW=row, D=width, BM=elements // columns, BN=columns), 4 if elements <= _ELEMENTS else 8


def _kernels():
    # Imported lazily: Triton may be missing.
    from keras_jamba._triton import norm_kernels

    return norm_kernels

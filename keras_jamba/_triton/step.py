"""Launch of the kernel for one token of the scan. It has no gradient.

Inputs of shape `(b, e)` or `(b, n)` may also be `Columns` of a wider array.
"""

from keras_jamba._triton import few_rows
from keras_jamba._triton.convolution import _tiles, columns
from keras_jamba._triton.tuning import power

# Threads that fill an H100.
_BUSY = 132 * 512


def scan(gpu, u, delta, A, B, C, D=None, z=None, bias=None, *, state, real=None, softplus=True, tile=None, into=None):
    """Computes one token of the scan.

    Args:
        gpu: a `Gpu`.
        u, delta, z: `(b, e)`; z may be None.
        A: `(e, n)`.
        B, C: `(b, n)`.
        D, bias: `(e,)` or None.
        state: `(b, e, n)` float32.
        real: `(b,)` int8 or None: 0 for padding, which keeps the state and has y = 0.
        softplus: whether to apply softplus to delta after its bias.
        tile: `(rows, channels, warps)` per program, where rows divide b; None chooses one.
        into: `{1: array}`, an array for the next state, which may be that of this step; or None.

    Returns:
        y `(b, e)` in the dtype of `u`, and the next state `(b, e, n)` float32.
    """
    (e, n), given = A.shape, dict(U=u, DELTA=delta, B=B, C=C, Z=u if z is None else z)
    given = {name: columns(x) for name, x in given.items()}
    b = given["U"].array.shape[0]
    rows, block, warps = tile or tile_for(b, e, n)
    constants = dict(CHANNELS=e, STATES=n, ROWS=rows, BLOCK=block, WIDTH=power(n), SOFTPLUS=softplus)
    constants |= dict(HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=bias is not None, REAL=real is not None)
    constants |= {f"{name}_ROW": x.step for name, x in given.items()}
    constants |= {f"{name}_FIRST": x.first for name, x in given.items()}
    u, delta, B, C, z = (x.array for x in given.values())
    inputs = (u, delta, A, B, C, A if D is None else D, z, A if bias is None else bias, state)
    inputs += (A if real is None else real,)
    outputs = [((b, e), u.dtype), ((b, e, n), state.dtype)]
    grid = (b // rows * _tiles(e, block),)
    weights = [x for x in (A, D, bias) if x is not None]
    return few_rows.run(gpu, _kernel("scan_step"), grid, inputs, outputs, constants, warps, weights, into)


def tile_for(b, e, n):
    """Returns rows, channels and warps per program: four states (16 bytes) per thread and row."""
    threads = b * e * power(n) // 4
    warps = 4 if threads >= 4 * _BUSY else 1
    rows = 1
    while rows < 4 and b % (2 * rows) == 0 and threads >= 16 * rows * _BUSY:
        rows *= 2
    return rows, max(1, warps * 128 // power(n)), warps


def _kernel(name):
    # Imported lazily: Triton may be missing.
    from keras_jamba._triton import step_kernels

    return getattr(step_kernels, name)

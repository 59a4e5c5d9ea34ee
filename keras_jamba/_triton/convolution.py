"""Launches of the convolution kernels: tiles, grids and outputs.

Every function takes `launch(kernel, grid, inputs, outputs, constants, num_warps, num_stages)` first. It returns arrays
of the requested `(shape, dtype)` in `outputs`.
"""

from typing import NamedTuple

from keras_jamba._triton import Program
from keras_jamba._triton.tuning import power

WIDEST = 8  # the largest kernel width

# Threads per warp, and warps that fill an H100.
_LANES, _BUSY = 32, 2640


class Columns(NamedTuple):
    """Slice of the channels of a wider array, from channel `first` on, without a copy.

    `row` is the stride from one token to the next in elements, or None for a contiguous array.
    """

    array: object
    first: int = 0
    row: int | None = None

    @property
    def step(self):
        return self.array.shape[-1] if self.row is None else self.row


class Tile(NamedTuple):
    """Work of one program: `runs` consecutive runs of `strip` tokens each, of `block` channels.

    `strip` is a multiple of `count`, the number of tokens that are loaded together.
    """

    block: int
    runs: int
    strip: int
    count: int  # type: ignore[assignment]  # hides a method of tuples
    warps: int


def columns(x):
    """Returns `x` as `Columns`."""
    return x if isinstance(x, Columns) else Columns(x)


def forward(launch, x, kernel, bias=None, initial=None, begins=None, order=None, counts=None, *, silu=True, tile=None):
    """Convolves every channel of `x` with its kernel over the current token and the w - 1 tokens before it.

    Args:
        launch: see above.
        x: `(b, t, e)`, or `Columns` of this shape.
        kernel: `(w, e)` float32, w from 1 to WIDEST.
        bias: `(e,)` float32 or None.
        initial: `(b, w - 1, e)`, the inputs before the first token, or None for zeros.
        begins: `(b, t)` int32 or None: how many of the w - 1 tokens before it each token's window reaches.
        order, counts: `(b, t)` and `(b,)` int32, or None. The first `counts` tokens of `order` are real, and follow
            each other in this order, in which `begins` counts as well. The output of the others is zero.
        silu: whether to apply SiLU to the result.
        tile: a `Tile`, or None to choose one.

    Returns:
        `(b, t, e)` in the dtype of `x`.
    """
    x = columns(x)
    (b, t), (_, e) = x.array.shape[:2], kernel.shape
    tile = tile or tile_for(b, t, kernel.shape, _vector(x.array))
    constants = _constants(x, kernel, bias, initial, begins, order, silu, tile)
    inputs = (x.array, *_inputs(x, kernel, bias, initial, begins, order, counts))
    outputs = [((b, t, e), x.array.dtype)]
    return _launched(launch, "convolution_forward", (b * _tiles(e, tile.block), t), inputs, outputs, constants, tile)[0]


def gradients(
    launch, grad_y, x, kernel, bias=None, initial=None, begins=None, order=None, counts=None, *, silu=True, tile=None
):
    """Computes the gradients of x `(b, t, e)`, kernel `(w, e)`, bias and initial; the last two may be None.

    The gradients of kernel and bias are float32. `grad_y` is `(b, t, e)`; the other arguments are those of `forward`.
    """
    x = columns(x)
    (b, t), (k, e) = x.array.shape[:2], kernel.shape
    if tile is None:
        # Partial sums and gradients double the registers of inputs and weights. 16 bytes per thread would halve the
        # number of threads, and with documents no thread would fit.
        tile = tile_for(b, t, kernel.shape, 4 if k <= 4 else 2)
    constants = _constants(x, kernel, bias, initial, begins, order, silu, tile)
    inputs = (grad_y, x.array, *_inputs(x, kernel, bias, initial, begins, order, counts))
    parts = b * _tiles(t, tile.runs * tile.strip)
    outputs = [((b, t, e), x.array.dtype), ((parts, k + 1, e), kernel.dtype)]
    outputs += [((1,), kernel.dtype) if initial is None or k == 1 else (initial.shape, initial.dtype)]
    grid = (b * _tiles(e, tile.block), t)
    grad_x, sums, grad_initial = _launched(launch, "convolution_backward", grid, inputs, outputs, constants, tile)
    sums = _summed(launch, sums)
    if initial is not None and k == 1:
        grad_initial = initial
    return grad_x, sums[:k], None if bias is None else sums[k], None if initial is None else grad_initial


def tile_for(b, t, kernel_shape, each):
    """Returns a tile with `each` channels per thread."""
    k, e = kernel_shape
    count = 4 if k <= 5 else 8
    block = max(each, min(_LANES * each, power(e)))
    runs = _LANES * each // block
    warps = 1
    while warps < 4 and runs * count < t:
        runs, warps = 2 * runs, 2 * warps
    strip = 64
    while strip > 16 and b * t * e < _BUSY * _LANES * each * strip or strip > count and runs * strip >= 2 * t:
        strip //= 2
    return Tile(block, runs, strip, count, warps)


def _vector(x):
    """Returns the number of elements in 16 bytes."""
    return 16 // x.dtype.itemsize


def _constants(x, kernel, bias, initial, begins, order, silu, tile):
    k, e = kernel.shape
    constants = dict(length=x.array.shape[1], K=k, CHANNELS=e, ROW=x.step, FIRST=x.first, SILU=silu)
    constants |= dict(BIAS=bias is not None, INITIAL=initial is not None and k > 1, BEGINS=begins is not None)
    constants |= dict(ORDER=order is not None)
    return constants | dict(RUNS=tile.runs, STRIP=tile.strip, BLOCK=tile.block, COUNT=tile.count)


def _inputs(x, kernel, bias, initial, begins, order, counts):
    """Returns the other inputs of a kernel, with the kernel of the convolution in place of None."""
    before = x.array if initial is None or kernel.shape[0] == 1 else initial
    return kernel, *(kernel if x is None else x for x in (bias, before, begins, order, counts))


def _launched(launch, name, sizes, inputs, outputs, constants, tile):
    blocks, t = sizes
    grid = (blocks * _tiles(t, tile.runs * tile.strip),)
    return launch(_kernel(name), grid, inputs, outputs, constants, num_warps=tile.warps, num_stages=1)


def _summed(launch, parts):
    """Computes the sum over the first axis."""
    count, rows, e = parts.shape
    constants = dict(count=count, COLUMNS=rows * e, ROWS=min(32, power(count)), BLOCK=64)
    grid, outputs = (_tiles(rows * e, 64),), [((rows, e), parts.dtype)]
    return launch(_kernel("convolution_sums"), grid, (parts,), outputs, constants, num_warps=4, num_stages=1)[0]


def _kernel(name):
    # Imported lazily: Triton may be missing.
    from keras_jamba._triton import convolution_kernels

    return getattr(convolution_kernels, name)


def _tiles(size, tile):
    return -(-size // tile)


def _sizes(shapes):
    (batch, length, channels), width = shapes["x"], shapes["kernel"][0]
    return dict(batch=batch, length=length, channels=channels, width=width)


def _arguments(gpu, tensors, options):
    x = Columns(tensors["x"], row=gpu.row(tensors["x"]))
    given = (x, *(tensors[name] for name in ("kernel", "bias", "initial", "reach", "order", "counts")))
    return given, dict(silu=bool(options["silu"]))


def _forward(gpu, tensors, options, train):
    given, options = _arguments(gpu, tensors, options)
    return (forward(gpu.launch, *given, **options),)


def _backward(gpu, tensors, options):
    given, options = _arguments(gpu, tensors, options)
    grad_x, grad_kernel, grad_bias, grad_initial = gradients(gpu.launch, tensors["grad_y"], *given, **options)
    # A copy, because the outputs of a PyTorch operator must not share memory.
    return grad_x, grad_kernel, None if grad_bias is None else grad_bias + 0.0, grad_initial


CONVOLUTION = Program(
    name="triton_conv",
    inputs=("x", "kernel", "bias", "initial", "mask", "segments", "reach", "order", "counts"),
    differentiable=4,
    outputs=("y",),
    num_residuals=0,
    options=("silu",),
    sizes=_sizes,
    shapes=lambda sizes: [(sizes["batch"], sizes["length"], sizes["channels"])],
    twice_differentiable_with="portable",
    forward=_forward,
    backward=_backward,
    strided=("x",),
    registers=None,
)

"""How the kernels of the convolution are launched: their tiles, their grids, what they put out.

Every function takes `launch(kernel, grid, inputs, outputs, constants, num_warps, num_stages)` first, which returns the
outputs: arrays of the `(shape, dtype)` that are asked for.
"""

from typing import NamedTuple

from keras_jamba._triton import Program
from keras_jamba._triton.tuning import power

WIDEST = 8  # tokens that a window holds at most

# Threads of a warp, and warps that keep an H100 busy.
_LANES, _BUSY = 32, 2640


class Columns(NamedTuple):
    """Some channels of a wider array, from the channel `first` on: nothing has to be copied.

    `row` is the step from one token to the next, None for that of a contiguous array.
    """

    array: object
    first: int = 0
    row: int | None = None

    @property
    def step(self):
        return self.array.shape[-1] if self.row is None else self.row


class Tile(NamedTuple):
    """What one program works on: `runs` runs of `strip` tokens that follow each other, of `block` channels.

    A multiple of `count` tokens is a strip.
    """

    block: int
    runs: int
    strip: int
    count: int
    warps: int


def columns(x):
    """`x` as `Columns`."""
    return x if isinstance(x, Columns) else Columns(x)


def forward(launch, x, kernel, bias=None, initial=None, begins=None, *, silu=True, tile=None):
    """`(b, t, e)`: every channel of `x` convolved with its kernel over the present and the k - 1 tokens before it.

    Args:
        x: `(b, t, e)`, or such `Columns` of it.
        kernel: `(k, e)` float32, k from 1 to WIDEST.
        bias: `(e,)` float32 or None.
        initial: `(b, k - 1, e)`, the inputs before the first token, or None for zeros.
        begins: `(b, t)` int32 or None: how many of the k - 1 tokens before it the window of each token reaches.
        silu: whether SiLU is applied to the result.
    """
    x = columns(x)
    (b, t), (_, e) = x.array.shape[:2], kernel.shape
    tile = tile or tile_for(b, t, kernel.shape, _vector(x.array))
    constants = _constants(x, kernel, bias, initial, begins, silu, tile)
    inputs = (x.array, *_inputs(x, kernel, bias, initial, begins))
    outputs = [((b, t, e), x.array.dtype)]
    return _launched(launch, "convolution_forward", (b * _tiles(e, tile.block), t), inputs, outputs, constants, tile)[0]


def gradients(launch, grad_y, x, kernel, bias=None, initial=None, begins=None, *, silu=True, tile=None):
    """Gradients of x `(b, t, e)`, kernel `(k, e)`, bias and initial, the last two None where these are.

    Those of kernel and bias are float32. grad_y: `(b, t, e)`; the other arguments are those of `forward`.
    """
    x = columns(x)
    (b, t), (k, e) = x.array.shape[:2], kernel.shape
    if tile is None:
        # Sums and gradients that are not complete take as many registers again as inputs and weights:
        # with 16 bytes a thread there would be room for half as many threads, and with documents for none.
        tile = tile_for(b, t, kernel.shape, 4 if k <= 4 else 2)
    constants = _constants(x, kernel, bias, initial, begins, silu, tile)
    inputs = (grad_y, x.array, *_inputs(x, kernel, bias, initial, begins))
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
    """A tile where a thread has `each` channels."""
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
    """Elements of 16 bytes."""
    return 16 // x.dtype.itemsize


def _constants(x, kernel, bias, initial, begins, silu, tile):
    k, e = kernel.shape
    constants = dict(length=x.array.shape[1], K=k, CHANNELS=e, ROW=x.step, FIRST=x.first, SILU=silu)
    constants |= dict(BIAS=bias is not None, INITIAL=initial is not None and k > 1, BEGINS=begins is not None)
    return constants | dict(RUNS=tile.runs, STRIP=tile.strip, BLOCK=tile.block, COUNT=tile.count)


def _inputs(x, kernel, bias, initial, begins):
    before = x.array if initial is None or kernel.shape[0] == 1 else initial
    return kernel, kernel if bias is None else bias, before, kernel if begins is None else begins


def _launched(launch, name, sizes, inputs, outputs, constants, tile):
    blocks, t = sizes
    grid = (blocks * _tiles(t, tile.runs * tile.strip),)
    return launch(_kernel(name), grid, inputs, outputs, constants, num_warps=tile.warps, num_stages=1)


def _summed(launch, parts):
    """Over the first axis."""
    count, rows, e = parts.shape
    constants = dict(count=count, COLUMNS=rows * e, ROWS=min(32, power(count)), BLOCK=64)
    grid, outputs = (_tiles(rows * e, 64),), [((rows, e), parts.dtype)]
    return launch(_kernel("convolution_sums"), grid, (parts,), outputs, constants, num_warps=4, num_stages=1)[0]


def _kernel(name):
    # Only here, where Triton is.
    from keras_jamba._triton import convolution_kernels

    return getattr(convolution_kernels, name)


def _tiles(size, tile):
    return -(-size // tile)


def _sizes(shapes):
    (batch, length, channels), width = shapes["x"], shapes["kernel"][0]
    return dict(batch=batch, length=length, channels=channels, width=width)


def _arguments(gpu, tensors, options):
    x = Columns(tensors["x"], row=gpu.row(tensors["x"]))
    given = (x, *(tensors[name] for name in ("kernel", "bias", "initial", "reach")))
    return given, dict(silu=bool(options["silu"]))


def _forward(gpu, tensors, options, train):
    given, options = _arguments(gpu, tensors, options)
    return (forward(gpu.launch, *given, **options),)


def _backward(gpu, tensors, options):
    given, options = _arguments(gpu, tensors, options)
    grad_x, grad_kernel, grad_bias, grad_initial = gradients(gpu.launch, tensors["grad_y"], *given, **options)
    # A copy, since what an operator of PyTorch returns may not share memory.
    return grad_x, grad_kernel, None if grad_bias is None else grad_bias + 0.0, grad_initial


CONVOLUTION = Program(
    name="triton_conv",
    inputs=("x", "kernel", "bias", "initial", "segments", "reach"),
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

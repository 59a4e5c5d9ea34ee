"""How the kernels of the selective scan are launched."""

from typing import NamedTuple

from keras_jamba._triton import Program, step
from keras_jamba._triton.convolution import Columns

MOST_STATES = 64
# The bit of a token's flags, beside 1 for a real one, that it begins a document; as in scan_kernels.py.
RESET = 2
# Most tokens between two states that are kept for the gradient: fewer cost memory, more cost time.
EVERY = 64
# Four warps of each scheduler hide what one of them waits for, and that many registers they have.
REGISTERS = 128


class Plan(NamedTuple):
    """How a scan is cut.

    Attributes:
        lanes: threads a channel.
        each: states a thread.
        block: channels a program.
        count: tokens of a tile.
        segment: tokens of a segment.
    """

    lanes: int
    each: int
    block: int
    count: int
    segment: int

    def constants(self, sizes):
        batch, length, channels, states = sizes.values()
        given = dict(length=length, segment=self.segment, CHANNELS=channels, STATES=states)
        return given | dict(LANES=self.lanes, EACH=self.each, BLOCK=self.block, COUNT=self.count)

    def grid(self, sizes):
        batch, length, channels, _ = sizes.values()
        return (batch * self.segments(sizes) * -(-channels // self.block),)

    def segments(self, sizes):
        return -(-sizes["length"] // self.segment)


def every(length):
    """Tokens between two states that are kept, about where these and those between two of them are fewest."""
    tokens = 16
    while tokens < EVERY and tokens * tokens < 4 * length:
        tokens *= 2
    return tokens


def _plan(sizes, lanes, least, count=None):
    """With `least` programs, if the sequence is long enough to be cut into that many."""
    batch, length, channels, states = sizes.values()
    block = 32 // lanes
    # A power of two, as all sides of tiles are.
    each = 1 << max(0, -(-states // lanes) - 1).bit_length()
    programs = batch * -(-channels // block)
    # A second pass must pay: twice as many programs then, and segments that are not short.
    cuts = max(1, min(-(-2 * least // programs), length // 256)) if programs < least else 1
    segment = -(-length // cuts)
    return Plan(lanes, each, block, count or lanes, -(-segment // every(length)) * every(length))


def forward_plan(sizes, multiprocessors):
    """Measured on an H100: about 16 programs a multiprocessor hide what each waits for, if no second pass is needed.

    More threads a channel make more programs, at the price of sums over more of them.
    """
    batch, _, channels, states = sizes.values()
    threads = batch * channels / multiprocessors
    lanes = 8 if threads <= 64 or states > 16 else 4 if threads <= 240 else 2
    return _plan(sizes, lanes, least=4 * multiprocessors, count=max(lanes, 4) if states <= 16 else 4)


def backward_plan(sizes, multiprocessors):
    lanes = 8 if sizes["states"] > 16 else 4
    return _plan(sizes, lanes, least=14 * multiprocessors, count=4)


def _sizes(shapes):
    (batch, length, channels), states = shapes["u"], shapes["A"][1]
    return dict(batch=batch, length=length, channels=channels, states=states)


def _shapes(sizes):
    batch, length, channels, states = sizes.values()
    kept = (batch, -(-length // every(length)), channels, states)
    return [(batch, length, channels), (batch, channels, states), kept]


def _or(x, other):
    """What a kernel is given in the place of None, and does not look at."""
    return other if x is None else x


def _flags_of(tensors, options):
    return dict(
        SOFTPLUS=bool(options["softplus"]),
        HAS_BIAS=tensors["bias"] is not None,
        FLAGS=tensors["flags"] is not None,
    )


def forward(gpu, tensors, options, train):
    from keras_jamba._triton import scan_kernels as kernels
    from keras_jamba._triton import scan_segment_kernels as segment_kernels

    u, delta, A, B, C, D, z, bias, initial = (tensors[name] for name in SCAN.inputs[:9])
    flags = tensors["flags"]
    if u.shape[1] == 1 and initial is not None and not train:
        return _one_token(gpu, tensors, options)
    B, C = (gpu.cast(x, "float32") for x in (B, C))
    sizes = _sizes({"u": u.shape, "A": A.shape})
    plan = forward_plan(sizes, gpu.multiprocessors)
    same = plan.constants(sizes) | _flags_of(tensors, options) | dict(U_ROW=gpu.row(u), DELTA_ROW=gpu.row(delta))
    single = lambda *shape: (shape, "float32")  # noqa: E731
    batch, length, channels, states = sizes.values()
    ends, decays = A, A
    if plan.segments(sizes) > 1:
        parts = single(batch, plan.segments(sizes), channels, states)
        inputs = (u, delta, A, B, _or(bias, A), _or(flags, u))
        ends, decays = gpu.launch(
            segment_kernels.scan_ends, plan.grid(sizes), inputs, [parts, parts], same, num_warps=1
        )
    inputs = (u, delta, A, B, C, _or(D, A), _or(z, u), _or(bias, A), _or(initial, A), _or(flags, u), ends, decays)
    outputs = [(shape, u.dtype if i == 0 else "float32") for i, shape in enumerate(_shapes(sizes))]
    outputs = outputs if train else [*outputs[:2], single(1)]
    has = dict(HAS_D=D is not None, HAS_Z=z is not None, HAS_INITIAL=initial is not None, TRAIN=bool(train))
    has |= dict(Z_ROW=gpu.row(_or(z, u)), EVERY=every(length), AHEAD=4)
    limits = dict(num_warps=1, registers=REGISTERS)
    y, last, kept = gpu.launch(kernels.scan_forward, plan.grid(sizes), inputs, outputs, same | has, **limits)
    return y, last, kept if train else None


def _one_token(gpu, tensors, options):
    """The flags say whether a token is real: alone, none begins a document."""
    of = lambda name: None if tensors[name] is None else Columns(tensors[name][:, 0], row=gpu.row(tensors[name]))  # noqa: E731
    real = None if tensors["flags"] is None else tensors["flags"][:, 0]
    y, last = step.scan(
        gpu.launch,
        *(of(name) for name in ("u", "delta")),
        tensors["A"],
        *(tensors[name][:, 0] for name in ("B", "C")),
        tensors["D"],
        of("z"),
        tensors["bias"],
        state=tensors["initial"],
        real=real,
        softplus=bool(options["softplus"]),
    )
    return y[:, None], last, None


def backward(gpu, tensors, options):
    from keras_jamba._triton import scan_gradient_kernels as kernels
    from keras_jamba._triton import scan_segment_kernels as segment_kernels

    u, delta, A, B, C, D, z, bias, initial = (tensors[name] for name in SCAN.inputs[:9])
    flags, grad_y, grad_last = tensors["flags"], tensors["grad_y"], tensors["grad_last"]
    given = B.dtype, C.dtype
    B, C = (gpu.cast(x, "float32") for x in (B, C))
    sizes = _sizes({"u": u.shape, "A": A.shape})
    batch, length, channels, states = sizes.values()
    plan = backward_plan(sizes, gpu.multiprocessors)
    segments = plan.segments(sizes)
    same = plan.constants(sizes) | _flags_of(tensors, options)
    same |= dict(DELTA_ROW=gpu.row(delta), Z_ROW=gpu.row(_or(z, u)), HAS_Z=z is not None)
    single = lambda *shape: (shape, "float32")  # noqa: E731
    parts = single(batch, segments, channels, states)
    carries, decays = A, A
    if segments > 1:
        inputs = (delta, A, C, _or(z, u), _or(bias, A), _or(flags, u), grad_y)
        carries, decays = gpu.launch(
            segment_kernels.scan_carries, plan.grid(sizes), inputs, [parts, parts], same, num_warps=1
        )
    inputs = (u, delta, A, B, C, _or(D, A), _or(z, u), _or(bias, A), _or(flags, u), tensors["checkpoints"])
    inputs += (grad_y, _or(grad_last, A), carries, decays)
    outputs = [(u.shape, u.dtype), (u.shape, delta.dtype)]
    outputs += [single(1) if z is None else (u.shape, z.dtype), parts]
    outputs += [single(batch, segments, channels)] * 2
    outputs += [
        single(1) if initial is None else single(batch, channels, states),
        single(batch, segments, every(length) // plan.count, channels, states),
    ]
    outputs += [single(batch, length, states)] * 2
    has = dict(U_ROW=gpu.row(u), EVERY=every(length), HAS_D=D is not None, HAS_LAST=grad_last is not None)
    has |= dict(HAS_INITIAL=initial is not None)
    found = gpu.launch(
        kernels.scan_backward,
        plan.grid(sizes),
        inputs,
        outputs,
        same | has,
        num_warps=1,
        registers=REGISTERS,
        zeroed=(8, 9),
    )
    grad_u, grad_delta, grad_z, grad_A, grad_D, grad_bias, grad_initial, _, grad_B, grad_C = found
    return (
        grad_u,
        grad_delta,
        grad_A.sum((0, 1)),
        *(gpu.cast(x, dtype) for x, dtype in zip((grad_B, grad_C), given, strict=True)),
        None if D is None else grad_D.sum((0, 1)),
        None if z is None else grad_z,
        None if bias is None else grad_bias.sum((0, 1)),
        None if initial is None else grad_initial,
    )


SCAN = Program(
    name="triton_scan",
    inputs=("u", "delta", "A", "B", "C", "D", "z", "bias", "initial", "mask", "segments", "flags"),
    differentiable=9,
    outputs=("y", "last", "checkpoints"),
    hidden=1,
    options=("softplus",),
    sizes=_sizes,
    shapes=_shapes,
    twice="reference",
    forward=forward,
    backward=backward,
    strided=("u", "delta", "z"),
    registers=REGISTERS,
)

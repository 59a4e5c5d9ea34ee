"""Launches of the kernels of the selective scan."""

import itertools
from typing import NamedTuple

from keras_jamba._triton import Program, step, tuning
from keras_jamba._triton.convolution import Columns

MOST_STATES = 64
# Bits of a token's flags: REAL, and RESET for one that begins a document; as in scan_kernels.py.
REAL, RESET = 1, 2
# The most tokens between two checkpoints of the state: fewer cost memory, more cost time.
EVERY = 64
# Registers per thread: 128 allow four warps per scheduler, 168 three. Warps hide each other's latencies. The gradient
# keeps more values per thread, which 128 registers cannot hold.
REGISTERS, GRADIENT_REGISTERS = 128, 168
# Tensors with a token axis.
_TOKENS = ("u", "delta", "B", "C", "z", "flags", "grad_y")


class Plan(NamedTuple):
    """Tiling of a scan.

    Attributes:
        lanes: threads per channel.
        each: states per thread.
        block: channels per program.
        count: tokens per tile.
        segment: tokens per segment.
    """

    lanes: int
    each: int
    block: int
    count: int  # type: ignore[assignment]  # hides a method of tuples
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
    """Returns the tokens between two checkpoints, about the number that minimises the states in memory.

    These are the checkpoints and the recomputed states between two of them.
    """
    tokens = 16
    while tokens < EVERY and tokens * tokens < 4 * length:
        tokens *= 2
    return tokens


def _plan(sizes, lanes, least, wanted, count):
    """Returns a plan of one segment if it has `least` programs, else with about `wanted` of them.

    A sequence is too short to split into segments of fewer than 256 tokens.
    """
    batch, length, channels, states = sizes.values()
    block = 32 // lanes
    # A power of two, as for all sides of tiles.
    each = 1 << max(0, -(-states // lanes) - 1).bit_length()
    programs = batch * -(-channels // block)
    # Segments need a second pass, which pays off with many programs and long segments.
    cuts = max(1, min(-(-wanted // programs), length // 256)) if programs < least else 1
    segment = -(-length // cuts)
    return Plan(lanes, each, block, count, -(-segment // every(length)) * every(length))


class Choice(NamedTuple):
    """Choice of `tuning`: threads per channel and tokens per tile."""

    lanes: int
    count: int  # type: ignore[assignment]  # hides a method of tuples


def forward_choice(sizes, multiprocessors):
    """Returns the rule of the forward kernel, measured on an H100.

    About 16 programs per multiprocessor hide latencies, if no second pass is needed. More threads per channel give more
    programs, but sums over more threads.
    """
    threads, states = sizes["batch"] * sizes["channels"] / multiprocessors, sizes["states"]
    lanes = 8 if threads <= 64 or states > 16 else 4 if threads <= 240 else 2
    return Choice(lanes, max(lanes, 4) if states <= 16 else 4)


def backward_choice(sizes):
    """Returns the rule of the backward kernel."""
    return Choice(8 if sizes["states"] > 16 else 4, 4)


def forward_plan(sizes, gpu, choice):
    most = gpu.multiprocessors
    return _plan(sizes, choice.lanes, least=4 * most, wanted=8 * most, count=choice.count)


def backward_plan(sizes, gpu, choice):
    most = gpu.multiprocessors
    return _plan(sizes, choice.lanes, least=9 * most, wanted=48 * most, count=choice.count)


def _sizes(shapes):
    (batch, length, channels), states = shapes["u"], shapes["A"][1]
    return dict(batch=batch, length=length, channels=channels, states=states)


def _shapes(sizes):
    batch, length, channels, states = sizes.values()
    kept = (batch, -(-length // every(length)), channels, states)
    return [(batch, length, channels), (batch, channels, states), kept]


def _pays(sizes):
    """Returns whether to cast B and C to float32 in two extra launches: otherwise every thread repeats the cast."""
    return sizes["batch"] * sizes["length"] * sizes["channels"] >= 2**24


def _or(x, other):
    """Returns `x`, or a placeholder for None that the kernel does not read."""
    return other if x is None else x


def _flags_of(tensors, options):
    return dict(
        SOFTPLUS=bool(options["softplus"]),
        HAS_BIAS=tensors["bias"] is not None,
        FLAGS=_flag_bits(tensors),
    )


def _flag_bits(tensors):
    """Returns the bits of the flags that the kernels read; all where only the flags are given."""
    if tensors["flags"] is None:
        return 0
    bits = (tensors["mask"] is not None) * REAL | (tensors["segments"] is not None) * RESET
    return bits or REAL | RESET


def forward(gpu, tensors, options, train):
    u = tensors["u"]
    if u.shape[1] == 1 and tensors["initial"] is not None and not train:
        return _one_token(gpu, tensors, options)
    sizes = _sizes({"u": u.shape, "A": tensors["A"].shape})
    rule = forward_choice(sizes, gpu.multiprocessors)
    run = lambda gpu, choice, found: _forward(gpu, choice, _all_names(tensors, found), options, train)  # noqa: E731
    return _forward(gpu, _chosen(gpu, "scan", tensors, sizes, (bool(train),), rule, run), tensors, options, train)


def _chosen(gpu, name, tensors, sizes, more, rule, run):
    """Returns the choice for a class of shapes; measurements shorten very long sequences."""
    if not tuning.measures(gpu):
        return rule
    batch, length, channels, states = sizes.values()
    short = min(length, max(64, 2**25 // (batch * channels)))
    tensors = {name: x for name, x in tensors.items() if x is not None and name not in ("mask", "segments")}
    dtype = str(tensors["u"].dtype).removeprefix("torch.")
    kind = states, dtype, *tensors, tuning.power(batch * channels / gpu.multiprocessors), tuning.power(length)
    lanes = [2, 4, 8] if states <= 16 else [4, 8]
    others = [Choice(*both) for both in itertools.product(lanes, (4, 8)) if both[1] <= max(4, both[0])]
    # Values without overflow and without slow subnormal numbers.
    fills = {"A": -1.0, "delta": -2.0, "flags": 1}
    shorter = {name: (batch, short, *tensors[name].shape[2:]) for name in _TOKENS if name in tensors}
    shorter["checkpoints"] = _shapes(sizes | {"length": short})[2]
    specs = {n: (shorter.get(n, x.shape), x.dtype, fills.get(n, 0.5)) for n, x in tensors.items()}
    return tuning.chosen(gpu, name, (*kind, *more), rule, others, specs, run)


def _all_names(tensors, found):
    return {name: found.get(name) for name in tensors}


def _forward(gpu, choice, tensors, options, train):
    from keras_jamba._triton import scan_kernels as kernels
    from keras_jamba._triton import scan_segment_kernels as segment_kernels

    u, delta, A, B, C, D, z, bias, initial = (tensors[name] for name in SCAN.inputs[:9])
    flags = tensors["flags"]
    sizes = _sizes({"u": u.shape, "A": A.shape})
    plan = forward_plan(sizes, gpu, choice)
    if plan.each >= 8 and _pays(sizes):
        B, C = (gpu.cast(x, "float32") for x in (B, C))
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
    """Computes a single token. Its flags only mark padding: a single token never begins a document."""
    of = lambda name: None if tensors[name] is None else Columns(tensors[name][:, 0], row=gpu.row(tensors[name]))  # noqa: E731
    real = None if tensors["flags"] is None else tensors["flags"][:, 0]
    y, last = step.scan(
        gpu,
        *(of(name) for name in ("u", "delta")),
        tensors["A"],
        *(of(name) for name in ("B", "C")),
        tensors["D"],
        of("z"),
        tensors["bias"],
        state=tensors["initial"],
        real=real,
        softplus=bool(options["softplus"]),
    )
    return y[:, None], last, None


def backward(gpu, tensors, options):
    sizes = _sizes({"u": tensors["u"].shape, "A": tensors["A"].shape})
    run = lambda gpu, choice, found: _backward(gpu, choice, _all_names(tensors, found), options)  # noqa: E731
    choice = _chosen(gpu, "scan's gradient", tensors, sizes, (), backward_choice(sizes), run)
    return _backward(gpu, choice, tensors, options)


def _backward(gpu, choice, tensors, options):
    from keras_jamba._triton import scan_gradient_kernels as kernels
    from keras_jamba._triton import scan_segment_kernels as segment_kernels

    u, delta, A, B, C, D, z, bias, initial = (tensors[name] for name in SCAN.inputs[:9])
    flags, grad_y, grad_last = tensors["flags"], tensors["grad_y"], tensors["grad_last"]
    given = B.dtype, C.dtype
    sizes = _sizes({"u": u.shape, "A": A.shape})
    if _pays(sizes):
        B, C = (gpu.cast(x, "float32") for x in (B, C))
    batch, length, channels, states = sizes.values()
    plan = backward_plan(sizes, gpu, choice)
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
        registers=GRADIENT_REGISTERS,
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
    num_residuals=1,
    options=("softplus",),
    sizes=_sizes,
    shapes=_shapes,
    twice_differentiable_with="reference",
    forward=forward,
    backward=backward,
    strided=("u", "delta", "z"),
    registers=(REGISTERS, GRADIENT_REGISTERS),
)

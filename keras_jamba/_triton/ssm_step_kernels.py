"""One token of the selective state space in two kernels: convolution and projection, then the rest.

Between kernels of a few microseconds, the start of the next one is a large part of the time. So both kernels compute
the convolution, and each program of the second one computes the norms of the projection.
"""

# Triton compiles these functions, and its types are not those of Python.
# mypy: ignore-errors

import triton
import triton.language as tl

from keras_jamba._triton.function_kernels import LOG2E, _let_next_start, _sigmoid, _softplus, _wait_for_inputs


@triton.jit
def _convolved(x, kernel, shift, state, e, E: tl.constexpr, W: tl.constexpr):
    """Returns SiLU of the convolution of one token at the channels e, rounded to the dtype of x."""
    ok = e < E
    total = tl.load(x + e, mask=ok, other=0).to(tl.float32)
    total = total * tl.load(kernel + (W - 1) * E + e, mask=ok, other=0).to(tl.float32) + shift
    for i in tl.static_range(W - 1):
        before = tl.load(state + i * E + e, mask=ok, other=0).to(tl.float32)
        total += before * tl.load(kernel + i * E + e, mask=ok, other=0).to(tl.float32)
    return (total * _sigmoid(total)).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _loaded_shift(bias, e, E: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return tl.load(bias + e, mask=e < E, other=0).to(tl.float32)
    return tl.zeros(e.shape, tl.float32)


@triton.jit
def convolved_product(
    x,
    kernel,
    bias,
    conv,
    matrix,
    parts,
    E: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Multiplies SiLU of the convolution of one token by `matrix (E, N)`. The sum of `parts (p, N)` is wanted.

    `x`: `(E,)`; `kernel`: `(W, E)`; `conv`: `(W - 1, E)`, the inputs before x.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    blocks = ()
    for i in tl.static_range(STEPS):
        e = (tl.program_id(1) * STEPS + i) * BK + tl.arange(0, BK)
        here = (e < E)[:, None] & (n < N)[None, :]
        blocks = blocks + (tl.load(matrix + e[:, None] * N + n[None, :], mask=here, other=0),)
    _wait_for_inputs(OVERLAPS)
    total = tl.zeros([BN], tl.float32)
    for i in tl.static_range(STEPS):
        e = (tl.program_id(1) * STEPS + i) * BK + tl.arange(0, BK)
        u = _convolved(x, kernel, _loaded_shift(bias, e, E, HAS_BIAS), conv, e, E, W)
        total += tl.sum(u[:, None] * blocks[i].to(tl.float32), 0)
    _let_next_start(OVERLAPS)
    tl.store(parts + tl.program_id(1) * N + n, total, mask=n < N)


@triton.jit
def _normed(
    parts,
    scale,
    n,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    EPSILON: tl.constexpr,
    dtype: tl.constexpr,
):
    """Returns the columns FIRST to FIRST + WIDTH of the sum of `parts (COUNT, N)`, normalised; n counts them."""
    total = tl.zeros(n.shape, tl.float32)
    for i in tl.static_range(COUNT):
        total += tl.load(parts + i * N + FIRST + n, mask=n < WIDTH, other=0.0)
    # Rounded where layers round.
    total = total.to(dtype).to(tl.float32)
    factor = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + EPSILON)
    return (total * factor * scale).to(dtype).to(tl.float32)


@triton.jit
def convolved_scan(
    x,
    z,
    kernel,
    bias,
    conv,
    parts,
    dt_scale,
    b_scale,
    c_scale,
    dt_matrix,
    A,
    D,
    dt_bias,
    state,
    y,
    conv_after,
    after,
    E: tl.constexpr,
    W: tl.constexpr,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    COUNT: tl.constexpr,
    EPSILON: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Computes `y (E,)` and the next states, for BLOCK channels per program.

    `parts`: `(COUNT, RANK + 2 STATES)`, see `convolved_product`. `dt_matrix`: `(RANK, E)`. The next states may replace
    `conv (W - 1, E)` and `state (E, STATES)`.
    """
    e, k, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BR), tl.arange(0, BS)
    ok, N = e < E, RANK + 2 * STATES
    place, here = e[:, None] * STATES + n[None, :], ok[:, None] & (n < STATES)[None, :]
    dtype: tl.constexpr = y.dtype.element_ty
    weights = tl.load(dt_matrix + k[:, None] * E + e[None, :], mask=(k < RANK)[:, None] & ok[None, :], other=0)
    A2 = tl.load(A + place, mask=here, other=0.0).to(tl.float32) * LOG2E
    skip = tl.load(D + e, mask=ok, other=0).to(tl.float32)
    step_bias = tl.load(dt_bias + e, mask=ok, other=0).to(tl.float32)
    shift = _loaded_shift(bias, e, E, HAS_BIAS)
    dt_factor = tl.load(dt_scale + k, mask=k < RANK, other=0).to(tl.float32)
    b_factor = tl.load(b_scale + n, mask=n < STATES, other=0).to(tl.float32)
    c_factor = tl.load(c_scale + n, mask=n < STATES, other=0).to(tl.float32)
    _wait_for_inputs(OVERLAPS)
    before = tl.load(state + place, mask=here, other=0.0)
    gate = tl.load(z + e, mask=ok, other=0).to(tl.float32)
    u = _convolved(x, kernel, shift, conv, e, E, W)
    # Other threads may have read these inputs and this state, which the stores may overwrite.
    tl.debug_barrier()
    # Each program moves the inputs of its own channels, oldest first.
    for i in tl.static_range(W - 2):
        tl.store(conv_after + i * E + e, tl.load(conv + (i + 1) * E + e, mask=ok, other=0), mask=ok)
        tl.debug_barrier()
    tl.store(conv_after + (W - 2) * E + e, tl.load(x + e, mask=ok, other=0), mask=ok)
    low = _normed(parts, dt_factor, k, 0, RANK, COUNT, N, EPSILON, dtype)
    delta = tl.sum(low[:, None] * weights.to(tl.float32), 0).to(dtype).to(tl.float32)
    B = _normed(parts, b_factor, n, RANK, STATES, COUNT, N, EPSILON, dtype)
    C = _normed(parts, c_factor, n, RANK + STATES, STATES, COUNT, N, EPSILON, dtype)
    _let_next_start(OVERLAPS)
    step = _softplus(delta + step_bias)
    h = tl.exp2(step[:, None] * A2) * before + (step * u)[:, None] * B[None, :]
    out = (tl.sum(h * C[None, :], 1) + skip * u) * gate * _sigmoid(gate)
    tl.store(after + place, h, mask=here)
    tl.store(y + e, out.to(dtype), mask=ok)

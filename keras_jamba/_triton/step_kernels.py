"""One token of the selective scan on a GPU, in Triton: forward only.

The kernel is bound by memory: it reads a state and writes the next one. A program handles BLOCK channels of ROWS rows,
whose states are contiguous. It issues all loads before the first computation, and reads A once for all rows.
"""

# Triton compiles these functions, and its types are not those of Python.
# mypy: ignore-errors

import triton
import triton.language as tl

from keras_jamba._triton.function_kernels import LOG2E, _let_next_start, _sigmoid, _softplus, _wait_for_inputs


@triton.jit
def scan_step(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    state,
    real,
    y,
    after,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    U_ROW: tl.constexpr,
    U_FIRST: tl.constexpr,
    DELTA_ROW: tl.constexpr,
    DELTA_FIRST: tl.constexpr,
    B_ROW: tl.constexpr,
    B_FIRST: tl.constexpr,
    C_ROW: tl.constexpr,
    C_FIRST: tl.constexpr,
    Z_ROW: tl.constexpr,
    Z_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Computes `y (b, e)` and the next state `after (b, e, n)` from `state (b, e, n)`, float32.

    `u`, `delta`, `z`: (b, e); `B`, `C`: (b, n). Each of these has its own row stride (ROW) and first column (FIRST).
    `A`: (e, n); `D`, `bias`: (e,). `real`: (b,), 0 for padding, which keeps the state and has y = 0. WIDTH: a power of
    two of at least STATES.
    """
    blocks = tl.cdiv(CHANNELS, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, WIDTH)
    ok, some = e < CHANNELS, n < STATES
    here, place = ok[:, None] & some[None, :], e[:, None] * STATES + n[None, :]
    A2 = tl.load(A + place, mask=here, other=0.0).to(tl.float32) * LOG2E
    skip = tl.load(D + e, mask=ok, other=0).to(tl.float32) if HAS_D else tl.zeros([BLOCK], tl.float32)
    shift = tl.load(bias + e, mask=ok, other=0).to(tl.float32) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    _wait_for_inputs(OVERLAPS)
    befores, us, deltas, zs, Bs, Cs = (), (), (), (), (), ()
    for r in tl.static_range(ROWS):
        befores = befores + (tl.load(state + (b + r) * (CHANNELS * STATES) + place, mask=here, other=0.0),)
        deltas = deltas + (tl.load(delta + (b + r) * DELTA_ROW + DELTA_FIRST + e, mask=ok, other=0),)
        us = us + (tl.load(u + (b + r) * U_ROW + U_FIRST + e, mask=ok, other=0),)
        Bs = Bs + (tl.load(B + (b + r) * B_ROW + B_FIRST + n, mask=some, other=0),)
        Cs = Cs + (tl.load(C + (b + r) * C_ROW + C_FIRST + n, mask=some, other=0),)
        if HAS_Z:
            zs = zs + (tl.load(z + (b + r) * Z_ROW + Z_FIRST + e, mask=ok, other=0),)
    _let_next_start(OVERLAPS)
    for r in tl.static_range(ROWS):
        x = us[r].to(tl.float32)
        step = deltas[r].to(tl.float32) + shift
        if SOFTPLUS:
            step = _softplus(step)
        h = tl.exp2(step[:, None] * A2) * befores[r] + (step * x)[:, None] * Bs[r].to(tl.float32)[None, :]
        out = tl.sum(h * Cs[r].to(tl.float32)[None, :], 1) + skip * x
        if HAS_Z:
            gate = zs[r].to(tl.float32)
            out = out * gate * _sigmoid(gate)
        if REAL:
            kept = tl.load(real + b + r) == 0
            h, out = tl.where(kept, befores[r], h), tl.where(kept, 0.0, out)
        tl.store(after + (b + r) * (CHANNELS * STATES) + place, h, mask=here)
        tl.store(y + (b + r) * CHANNELS + e, out.to(y.dtype.element_ty), mask=ok)

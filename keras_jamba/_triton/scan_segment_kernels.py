"""The first pass over the segments of a sequence, which run in parallel; see scan_kernels.py."""

import triton
import triton.language as tl

from keras_jamba._triton.function_kernels import LOG2E
from keras_jamba._triton.scan_gradient_kernels import _gated
from keras_jamba._triton.scan_kernels import (
    RESET,
    _continued,
    _decay,
    _held,
    _marks,
    _place,
    _row,
    _states,
    _time_steps,
    _tokens,
)


@triton.jit
def _total_decay(exponent, begins, FLAGS: tl.constexpr):
    """Returns the decay over a segment, or -1 if a document begins in it: 0 would keep NaN and infinity."""
    if FLAGS >= 2:
        return tl.where(begins, -1.0, tl.exp2(exponent))
    else:
        return tl.exp2(exponent)


@triton.jit
def scan_ends(
    u,
    delta,
    A,
    B,
    bias,
    flags,
    ends,
    decays,
    length,
    segment,
    CHANNELS: tl.constexpr,
    U_ROW: tl.constexpr,
    DELTA_ROW: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Computes per segment the last state from an initial state of zeros, and the total decay: (b, segments, e, n)."""
    b, number, begin, end, e = _place(length, segment, CHANNELS, BLOCK)
    t = tl.arange(0, COUNT)
    n = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    ok = e < CHANNELS
    here = (n < STATES)[:, :, None] & ok[None, None, :]
    state = n[:, :, None] + e[None, None, :] * STATES
    A2 = tl.load(A + state, mask=here, other=0.0) * LOG2E
    shift = tl.load(bias + e, mask=ok, other=0.0) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    h = tl.zeros([LANES, EACH, BLOCK], tl.float32)
    exponent = tl.zeros([LANES, EACH, BLOCK], tl.float32)
    begins = tl.full([], False, tl.int1)
    first, left = b * length + begin, end - begin
    next_u = _tokens(u + first * U_ROW, t, e, left, U_ROW, CHANNELS, False)
    next_delta = _tokens(delta + first * DELTA_ROW, t, e, left, DELTA_ROW, CHANNELS, False)
    next_marks = _marks(flags + first, left, COUNT, FLAGS)
    next_B = _states(B + first * STATES, next_marks, n, left, STATES, COUNT, FLAGS, False)
    for at in range(0, left, COUNT):
        now_u, now_delta, now_B, marks, place = next_u, next_delta, next_B, next_marks, first + at
        ahead = left - at - COUNT
        next_u = _tokens(u + (place + COUNT) * U_ROW, t, e, ahead, U_ROW, CHANNELS, False)
        next_delta = _tokens(delta + (place + COUNT) * DELTA_ROW, t, e, ahead, DELTA_ROW, CHANNELS, False)
        after = place + COUNT
        next_marks = _marks(flags + after, ahead, COUNT, FLAGS)
        next_B = _states(B + after * STATES, next_marks, n, ahead, STATES, COUNT, FLAGS, False)
        steps = _time_steps(now_delta, shift, flags + place, t, left - at, SOFTPLUS, FLAGS, False)
        driven = steps * _held(now_u.to(tl.float32), flags + place, t, left - at, FLAGS, True)
        for i in tl.static_range(COUNT):
            before = _continued(h, marks, i, FLAGS)
            h = _decay(steps, A2, i) * before + _row(driven, i)[None, None, :] * now_B[i][:, :, None]
            exponent += _row(steps, i)[None, None, :] * A2
            if FLAGS >= 2:
                begins = begins | ((marks[i] & RESET) != 0)
    part = (b * tl.cdiv(length, segment) + number) * CHANNELS * STATES + state
    tl.store(ends + part, h, mask=here)
    tl.store(decays + part, _total_decay(exponent, begins, FLAGS), mask=here)


@triton.jit
def scan_carries(
    delta,
    A,
    C,
    z,
    bias,
    flags,
    grad_y,
    carries,
    decays,
    length,
    segment,
    CHANNELS: tl.constexpr,
    DELTA_ROW: tl.constexpr,
    Z_ROW: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Computes per segment `q` of its first token, given 0 after its last, and its decay: (b, segments, e, n)."""
    b, number, begin, end, e = _place(length, segment, CHANNELS, BLOCK)
    t = tl.arange(0, COUNT)
    n = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    ok = e < CHANNELS
    here = (n < STATES)[:, :, None] & ok[None, None, :]
    state = n[:, :, None] + e[None, None, :] * STATES
    A2 = tl.load(A + state, mask=here, other=0.0) * LOG2E
    shift = tl.load(bias + e, mask=ok, other=0.0) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    carry = tl.zeros([LANES, EACH, BLOCK], tl.float32)
    exponent = tl.zeros([LANES, EACH, BLOCK], tl.float32)
    begins = tl.full([], False, tl.int1)
    for k in range(tl.cdiv(end - begin, COUNT) - 1, -1, -1):
        at = begin + k * COUNT
        place, left = b * length + at, end - at
        raw = _tokens(delta + place * DELTA_ROW, t, e, left, DELTA_ROW, CHANNELS, False)
        gate = _tokens(z + place * Z_ROW, t, e, left, Z_ROW, CHANNELS, False) if HAS_Z else raw
        dy = _tokens(grad_y + place * CHANNELS, t, e, left, CHANNELS, CHANNELS, False)
        marks = _marks(flags + place, left, COUNT, FLAGS)
        Cs = _states(C + place * STATES, marks, n, left, STATES, COUNT, FLAGS, False)
        steps = _time_steps(raw, shift, flags + place, t, left, SOFTPLUS, FLAGS, False)
        g = _gated(dy, gate, flags + place, t, left, HAS_Z, FLAGS)
        for i in tl.static_range(COUNT - 1, -1, -1):
            carry = _decay(steps, A2, i) * (_row(g, i)[None, None, :] * Cs[i][:, :, None] + carry)
            carry = _continued(carry, marks, i, FLAGS)
            exponent += _row(steps, i)[None, None, :] * A2
            if FLAGS >= 2:
                begins = begins | ((marks[i] & RESET) != 0)
    part = (b * tl.cdiv(length, segment) + number) * CHANNELS * STATES + state
    tl.store(carries + part, carry, mask=here)
    tl.store(decays + part, _total_decay(exponent, begins, FLAGS), mask=here)

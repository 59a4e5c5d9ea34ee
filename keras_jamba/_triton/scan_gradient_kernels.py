"""The gradient of the selective scan on a GPU, in Triton; see scan_kernels.py.

The recurrence in reverse is `dh_t = g_t C_t + q_{t+1}` with `q_t = decay_t dh_t`. A program steps back through time,
COUNT tokens at once. It first runs forward over these tokens from a stored state, keeps decays and states in registers,
and then runs backward. The gradients of B and C are sums over channels. The kernel transposes a tile with one row per
token and state so that rows become lanes: threads then sum without communication, and one atomic instruction adds many
sums to memory.
"""

# Triton compiles these functions, and its types are not those of Python.
# mypy: ignore-errors

import triton
import triton.language as tl

from keras_jamba._triton.function_kernels import LN2, LOG2E, _sigmoid
from keras_jamba._triton.scan_kernels import (
    _combined,
    _continued,
    _decay,
    _held,
    _marks,
    _place,
    _put,
    _row,
    _states,
    _sums,
    _time_steps,
    _tokens,
)


@triton.jit
def _stacked(tiles, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stacks COUNT tiles (ROWS, COLUMNS), a power of two of them, to (COUNT, ROWS, COLUMNS)."""
    if COUNT == 1:
        return tl.reshape(tiles[0], [1, ROWS, COLUMNS])
    else:
        half: tl.constexpr = COUNT // 2
        low = _stacked(tiles[:half], half, ROWS, COLUMNS)
        high = _stacked(tiles[half:], half, ROWS, COLUMNS)
        return tl.reshape(tl.permute(tl.join(low, high), (3, 0, 1, 2)), [COUNT, ROWS, COLUMNS])


@triton.jit
def _row_sums(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Computes row sums by halving: the first step turns rows into lanes, the others are inside threads."""
    if COLUMNS == 1:
        return tl.reshape(x, [ROWS])
    else:
        half: tl.constexpr = COLUMNS // 2
        even, odd = tl.split(tl.reshape(x, [ROWS, half, 2]))
        return _row_sums(even + odd, ROWS, half)


@triton.jit
def _gated(dy, z, flags, t, left, HAS_Z: tl.constexpr, FLAGS: tl.constexpr):
    """Computes the gradient of the output before the gate; 0 for padding."""
    g = dy.to(tl.float32)
    if HAS_Z:
        gate = z.to(tl.float32)
        g = g * gate * _sigmoid(gate)
    return _held(g, flags, t, left, FLAGS, True)


@triton.jit
def _kahan_sum(total, lost, x):
    """Adds `x` to `total` by Kahan summation: returns the sum and the accumulated rounding error."""
    x -= lost
    found = total + x
    return found, (found - total) - x


@triton.jit
def scan_backward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    flags,
    checkpoints,
    grad_y,
    grad_last,
    carries,
    decays,
    grad_u,
    grad_delta,
    grad_z,
    grad_A,
    grad_D,
    grad_bias,
    grad_initial,
    states,
    grad_B,
    grad_C,
    length,
    segment,
    CHANNELS: tl.constexpr,
    U_ROW: tl.constexpr,
    DELTA_ROW: tl.constexpr,
    Z_ROW: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_LAST: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Computes the gradients of all inputs.

    `grad_u`, `grad_delta`, `grad_z`: (b, t, e). `grad_initial`: (b, e, n). `grad_A`: (b, segments, e, n), and `grad_D`,
    `grad_bias`: (b, segments, e); the caller sums these over b and segments. `grad_B`, `grad_C`: (b, t, n), initially
    zeros. `states`: (b, segments, EVERY / COUNT, e, n), scratch memory for the states between two checkpoints.
    """
    b, number, begin, end, e = _place(length, segment, CHANNELS, BLOCK)
    segments = tl.cdiv(length, segment)
    t = tl.arange(0, COUNT)
    n = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    ok = e < CHANNELS
    here = (n < STATES)[:, :, None] & ok[None, None, :]
    state = n[:, :, None] + e[None, None, :] * STATES
    PLANE: tl.constexpr = CHANNELS * STATES
    A2 = tl.load(A + state, mask=here, other=0.0) * LOG2E
    skip = tl.load(D + e, mask=ok, other=0.0) if HAS_D else tl.zeros([BLOCK], tl.float32)
    shift = tl.load(bias + e, mask=ok, other=0.0) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    carry = tl.zeros([LANES, EACH, BLOCK], tl.float32)
    if HAS_LAST:
        carry = tl.load(grad_last + b * PLANE + state, mask=here, other=0.0)
    for behind in range(segments - 1, number, -1):
        part = (b * segments + behind) * PLANE + state
        decay = tl.load(decays + part, mask=here, other=0.0)
        carry = _combined(decay, carry, tl.load(carries + part, mask=here, other=0.0), FLAGS)

    row = b * length
    states += (b * segments + number) * (EVERY // COUNT) * PLANE
    checkpoints += b * tl.cdiv(length, EVERY) * PLANE
    sum_A = tl.zeros([LANES, EACH, BLOCK], tl.float32)
    sum_D = tl.zeros([COUNT, BLOCK], tl.float32)
    sum_bias = tl.zeros([COUNT, BLOCK], tl.float32)
    lost_D = tl.zeros([COUNT, BLOCK], tl.float32)
    lost_bias = tl.zeros([COUNT, BLOCK], tl.float32)
    for chunk in range(tl.cdiv(end, EVERY) - 1, begin // EVERY - 1, -1):
        parts = tl.cdiv(tl.minimum(end - chunk * EVERY, EVERY), COUNT)
        h = tl.load(checkpoints + tl.cast(chunk, tl.int64) * PLANE + state, mask=here, other=0.0)
        # Recomputes the state before each tile of the chunk, and prefetches the next tile.
        start, rest = row + chunk * EVERY, end - chunk * EVERY
        next_u = _tokens(u + start * U_ROW, t, e, rest, U_ROW, CHANNELS, False)
        next_delta = _tokens(delta + start * DELTA_ROW, t, e, rest, DELTA_ROW, CHANNELS, False)
        for k in range(0, parts - 1):
            place = start + k * COUNT
            x, raw, left = next_u.to(tl.float32), next_delta, rest - (k + 1) * COUNT
            next_u = _tokens(u + (place + COUNT) * U_ROW, t, e, left, U_ROW, CHANNELS, False)
            next_delta = _tokens(delta + (place + COUNT) * DELTA_ROW, t, e, left, DELTA_ROW, CHANNELS, False)
            steps = _time_steps(raw, shift, flags + place, t, COUNT, SOFTPLUS, FLAGS, True)
            driven = steps * _held(x, flags + place, t, COUNT, FLAGS, True)
            marks = _marks(flags + place, COUNT, COUNT, FLAGS)
            Bs = _states(B + place * STATES, marks, n, COUNT, STATES, COUNT, FLAGS, True)
            tl.store(states + k * PLANE + state, h, mask=here)
            for i in tl.static_range(COUNT):
                drive = _row(driven, i)[None, None, :] * Bs[i][:, :, None]
                h = _decay(steps, A2, i) * _continued(h, marks, i, FLAGS) + drive
        place = start + (parts - 1) * COUNT
        left = rest - (parts - 1) * COUNT
        next_z = _tokens(z + place * Z_ROW, t, e, left, Z_ROW, CHANNELS, False) if HAS_Z else next_u
        next_dy = _tokens(grad_y + place * CHANNELS, t, e, left, CHANNELS, CHANNELS, False)
        next_h = h
        for k in range(parts - 1, -1, -1):
            place, left = start + k * COUNT, rest - k * COUNT
            raw, gate, dy, h = next_delta, next_z, next_dy, next_h
            x = _held(next_u.to(tl.float32), flags + place, t, left, FLAGS, True)
            marks = _marks(flags + place, left, COUNT, FLAGS)
            Bs = _states(B + place * STATES, marks, n, left, STATES, COUNT, FLAGS, False)
            Cs = _states(C + place * STATES, marks, n, left, STATES, COUNT, FLAGS, False)
            ahead = tl.maximum(k - 1, 0)
            at = start + ahead * COUNT
            more = rest - ahead * COUNT
            next_u = _tokens(u + at * U_ROW, t, e, more, U_ROW, CHANNELS, False)
            next_delta = _tokens(delta + at * DELTA_ROW, t, e, more, DELTA_ROW, CHANNELS, False)
            next_z = _tokens(z + at * Z_ROW, t, e, more, Z_ROW, CHANNELS, False) if HAS_Z else next_u
            next_dy = _tokens(grad_y + at * CHANNELS, t, e, more, CHANNELS, CHANNELS, False)
            next_h = tl.load(states + ahead * PLANE + state, mask=here, other=0.0)
            steps = _time_steps(raw, shift, flags + place, t, left, SOFTPLUS, FLAGS, False)
            g = _gated(dy, gate, flags + place, t, left, HAS_Z, FLAGS)
            driven = steps * x
            decay, befores, afters = (), (), ()
            for i in tl.static_range(COUNT):
                decay = decay + (_decay(steps, A2, i),)
                befores = befores + (_continued(h, marks, i, FLAGS),)
                h = decay[i] * befores[i] + _row(driven, i)[None, None, :] * Bs[i][:, :, None]
                afters = afters + (h,)
            products, of_u, of_steps, of_z = (), (), (), ()
            for i in tl.static_range(COUNT - 1, -1, -1):
                dy_i = _row(g, i)[None, None, :]
                grad_h = dy_i * Cs[i][:, :, None] + carry
                carry = decay[i] * grad_h
                exponent = carry * befores[i]
                carry = _continued(carry, marks, i, FLAGS)
                sum_A += exponent * _row(steps, i)[None, None, :]
                products = (grad_h * _row(driven, i)[None, None, :], dy_i * afters[i]) + products
                of_u = (grad_h * Bs[i][:, :, None],) + of_u
                of_steps = (exponent * A2,) + of_steps
                if HAS_Z:
                    of_z = (afters[i] * Cs[i][:, :, None],) + of_z
            rows: tl.constexpr = 2 * COUNT * LANES * EACH
            stacked = _stacked(products, 2 * COUNT, LANES * EACH, BLOCK)
            sums = _row_sums(tl.reshape(stacked, [rows, BLOCK]), rows, BLOCK)
            r = tl.arange(0, rows)
            token, of_C, column = r // (2 * LANES * EACH), r // (LANES * EACH) % 2, r % (LANES * EACH)
            target = (place + token) * STATES + column
            there = (token < left) & (column < STATES)
            tl.atomic_add(tl.where(of_C == 0, grad_B + target, grad_C + target), sums, mask=there, sem="relaxed")
            sum_u = _sums(of_u, t)
            slope = _sums(of_steps, t) * LN2 + x * sum_u
            if SOFTPLUS:
                slope = slope * _sigmoid(raw.to(tl.float32) + shift[None, :])
            slope = _held(slope, flags + place, t, left, FLAGS, False)
            sum_bias, lost_bias = _kahan_sum(sum_bias, lost_bias, slope)
            sum_D, lost_D = _kahan_sum(sum_D, lost_D, g * x)
            of_x = _held(steps * sum_u + g * skip[None, :], flags + place, t, left, FLAGS, True)
            _put(grad_u + place * CHANNELS, of_x, t, e, left, CHANNELS, False)
            _put(grad_delta + place * CHANNELS, slope, t, e, left, CHANNELS, False)
            if HAS_Z:
                gate = gate.to(tl.float32)
                share = _sigmoid(gate)
                read = (_sums(of_z, t) + skip[None, :] * x) * dy.to(tl.float32) * share * (1 + gate * (1 - share))
                read = _held(read, flags + place, t, left, FLAGS, True)
                _put(grad_z + place * CHANNELS, read, t, e, left, CHANNELS, False)
    tl.store(grad_A + (b * segments + number) * PLANE + state, sum_A, mask=here)
    if HAS_INITIAL and number == 0:
        tl.store(grad_initial + b * PLANE + state, carry, mask=here)
    part = (b * segments + number) * CHANNELS + e
    tl.store(grad_D + part, tl.sum(sum_D, axis=0), mask=ok)
    tl.store(grad_bias + part, tl.sum(sum_bias, axis=0), mask=ok)

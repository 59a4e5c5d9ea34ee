"""The selective scan on a GPU, in Triton: forward.

A warp steps BLOCK channels of one row through time: LANES threads per channel, each with EACH states in registers, as a
tile (LANES, EACH, BLOCK). There is no tree over tokens, and sums over states are mostly inside a thread. Work per token
and channel (softplus, gate) is done for COUNT tokens at once, as a tile (COUNT, BLOCK) with one element per thread.
`_row` passes a token's row to all threads of its channels. A program is one warp, so it needs no synchronisation. One
step of the loop runs the recurrence of one tile, prepares the next, and loads further ones.

Long sequences are split into segments that run in parallel. A first pass computes the final state of each segment and
its decay of the state before. The second pass combines these of the earlier segments into its initial state.

Exponentials limit the speed: one per state and token, 16 per clock on a multiprocessor. So decays are powers of two,
`exp(delta A) = 2 ** (delta A2)` with `A2 = A log2(e)`.
"""

# Triton compiles these functions, and its types are not those of Python.
# mypy: ignore-errors

import triton
import triton.language as tl

from keras_jamba._triton.function_kernels import LOG2E, _sigmoid, _softplus

# Bits of a token's flags. A kernel's constant FLAGS is 1 with padding, 2 with documents, 3 with both, 0 without flags.
REAL, RESET = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _opaque_zero():
    """Returns 0 as a value unknown to the compiler: a pointer plus it gets no layout for wide vectors."""
    return tl.num_programs(2) - 1


@triton.jit
def _row(x, i: tl.constexpr):
    BLOCK: tl.constexpr = x.shape[1]
    return tl.reshape(tl.gather(x, tl.full([1, BLOCK], i, tl.int32), 0), [BLOCK])


@triton.jit
def _tokens(pointer, t, e, left, ROW: tl.constexpr, CHANNELS: tl.constexpr, FULL_TILE: tl.constexpr):
    """Loads a tile (COUNT, BLOCK) of tokens; zeros past the `left` remaining tokens.

    FULL_TILE means that all tokens and channels of the tile exist.
    """
    place = pointer + (t[:, None] * ROW + e[None, :] + _opaque_zero())
    if FULL_TILE:
        return tl.load(place)
    else:
        return tl.load(place, mask=(t < left)[:, None] & (e < CHANNELS)[None, :], other=0)


@triton.jit
def _gathered(
    u,
    delta,
    z,
    at,
    t,
    e,
    left,
    U_ROW: tl.constexpr,
    DELTA_ROW: tl.constexpr,
    Z_ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_Z: tl.constexpr,
    FULL_TILE: tl.constexpr,
):
    """Loads tiles of u, delta and z of the tokens from `at` on."""
    x = _tokens(u + at * U_ROW, t, e, left, U_ROW, CHANNELS, FULL_TILE)
    raw = _tokens(delta + at * DELTA_ROW, t, e, left, DELTA_ROW, CHANNELS, FULL_TILE)
    return x, raw, _tokens(z + at * Z_ROW, t, e, left, Z_ROW, CHANNELS, FULL_TILE) if HAS_Z else x


@triton.jit
def _put(pointer, x, t, e, left, CHANNELS: tl.constexpr, FULL_TILE: tl.constexpr):
    place = pointer + (t[:, None] * CHANNELS + e[None, :] + _opaque_zero())
    if FULL_TILE:
        tl.store(place, x.to(pointer.dtype.element_ty))
    else:
        tl.store(place, x.to(pointer.dtype.element_ty), mask=(t < left)[:, None] & (e < CHANNELS)[None, :])


@triton.jit
def _marks(flags, left, COUNT: tl.constexpr, FLAGS: tl.constexpr):
    """Loads the flags of COUNT tokens as scalars, 0 past the `left` tokens; an empty tuple without FLAGS."""
    found = ()
    if FLAGS != 0:
        for i in tl.static_range(COUNT):
            found = found + (tl.load(flags + i, mask=i < left, other=0).to(tl.int32),)
    return found


@triton.jit
def _states(
    pointer,
    marks,
    n,
    left,
    STATES: tl.constexpr,
    COUNT: tl.constexpr,
    FLAGS: tl.constexpr,
    FULL_TILE: tl.constexpr,
):
    """Loads B or C of COUNT tokens, each (LANES, EACH).

    Repeats the last past the `left` tokens, unless FULL_TILE. With padding, it and tokens past the end are zeros.
    """
    found = ()
    for i in tl.static_range(COUNT):
        place = pointer + i * STATES if FULL_TILE else pointer + tl.minimum(i, left - 1) * STATES
        if FLAGS % 2 == 1:
            found = found + (tl.load(place + n, mask=(n < STATES) & ((marks[i] & REAL) != 0), other=0.0),)
        elif STATES == n.shape[0] * n.shape[1]:
            found = found + (tl.load(place + n),)
        else:
            found = found + (tl.load(place + n, mask=n < STATES, other=0.0),)
    return found


@triton.jit
def _held(x, flags, t, left, FLAGS: tl.constexpr, FULL_TILE: tl.constexpr):
    """Returns `x (COUNT, BLOCK)` with zeros for padding and past the `left` tokens."""
    if FLAGS % 2 == 1:
        real = (tl.load(flags + t, mask=t < left, other=0).to(tl.int32) & REAL) != 0
        return tl.where(real[:, None], x, 0.0)
    elif FULL_TILE:
        return x
    else:
        return tl.where((t < left)[:, None], x, 0.0)


@triton.jit
def _time_steps(raw, shift, flags, t, left, SOFTPLUS: tl.constexpr, FLAGS: tl.constexpr, FULL_TILE: tl.constexpr):
    """Computes delta' of each token: 0, which keeps the state, for padding."""
    steps = raw.to(tl.float32) + shift[None, :]
    if SOFTPLUS:
        steps = _softplus(steps)
    return _held(steps, flags, t, left, FLAGS, FULL_TILE)


@triton.jit
def _decay(steps, A2, i: tl.constexpr):
    return tl.exp2(_row(steps, i)[None, None, :] * A2)


@triton.jit
def _continued(state, marks, i: tl.constexpr, FLAGS: tl.constexpr):
    """Returns the state before token i, or its gradient: zeros where a document begins.

    A product with 0 would keep NaN and infinity of the document before.
    """
    if FLAGS >= 2:
        return tl.where((marks[i] & RESET) != 0, 0.0, state)
    else:
        return state


@triton.jit
def _combined(decay, before, end, FLAGS: tl.constexpr):
    """Returns the state after a segment with the final state `end` from zeros.

    The decay of the state `before` is negative if a document begins in the segment.
    """
    if FLAGS >= 2:
        return tl.where(decay < 0, 0.0, decay * before) + end
    else:
        return decay * before + end


@triton.jit
def _halved(parts, HALF: tl.constexpr):
    """Halves the number of `(LANES, BLOCK)` parts: each lane keeps one half and exchanges the other with a partner."""
    lane = tl.arange(0, parts[0].shape[0])[:, None] + tl.zeros(parts[0].shape, tl.int32)
    upper = (lane & HALF) != 0
    found = ()
    for i in tl.static_range(HALF):
        low = parts[i]
        high = parts[i + HALF]
        given = tl.where(upper, low, high)
        found = found + (tl.where(upper, high, low) + tl.gather(given, lane ^ HALF, 0),)
    return found


@triton.jit
def _sums(parts, t):
    """Computes the sum over the states of each token's `(LANES, EACH, BLOCK)`, as a tile `(COUNT, BLOCK)`.

    A reduction per token would give the same sum to all lanes. With COUNT = LANES, each lane ends with the sum of one
    token, after COUNT - 1 steps instead of COUNT log2(LANES).
    """
    COUNT: tl.constexpr = t.shape[0]
    LANES: tl.constexpr = parts[0].shape[0]
    BLOCK: tl.constexpr = parts[0].shape[2]
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.sum(parts[i], axis=1),)
    if COUNT == LANES and COUNT <= 8:
        if COUNT == 8:
            found = _halved(found, 4)
        if COUNT >= 4:
            found = _halved(found, 2)
        if COUNT >= 2:
            found = _halved(found, 1)
        return found[0]
    else:
        out = tl.zeros([COUNT, BLOCK], tl.float32)
        for i in tl.static_range(COUNT):
            out = tl.where(t[:, None] == i, tl.sum(found[i], axis=0)[None, :], out)
        return out


@triton.jit
def _prepared(
    tile,
    shift,
    flags,
    t,
    left,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    FLAGS: tl.constexpr,
    FULL_TILE: tl.constexpr,
):
    """Computes the terms of a tile that do not depend on the state: delta', delta' u, u and silu(z)."""
    u, delta, z = tile
    x = _held(u.to(tl.float32), flags, t, left, FLAGS, True)
    steps = _time_steps(delta, shift, flags, t, left, SOFTPLUS, FLAGS, FULL_TILE)
    share = x
    if HAS_Z:
        gate = z.to(tl.float32)
        share = gate * _sigmoid(gate)
    return steps, steps * x, x, share


@triton.jit
def _recurred(h, steps, driven, B, C, A2, marks, t, FLAGS: tl.constexpr):
    """Computes the state after a tile's tokens, and the sum of C h of each token."""
    parts = ()
    for i in tl.static_range(t.shape[0]):
        before = _continued(h, marks, i, FLAGS)
        h = _decay(steps, A2, i) * before + _row(driven, i)[None, None, :] * B[i][:, :, None]
        parts = parts + (h * C[i][:, :, None],)
    return h, _sums(parts, t)


@triton.jit
def _finish(
    out,
    x,
    share,
    skip,
    pointer,
    flags,
    t,
    e,
    left,
    CHANNELS: tl.constexpr,
    HAS_Z: tl.constexpr,
    FLAGS: tl.constexpr,
    FULL_TILE: tl.constexpr,
):
    """Skips, gates and stores a tile's outputs."""
    out += skip[None, :] * x
    if HAS_Z:
        out = out * share
    _put(pointer, _held(out, flags, t, left, FLAGS, True), t, e, left, CHANNELS, FULL_TILE)


@triton.jit
def _place(length, segment, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns this program's row, its segment's number, begin and end, and its channels."""
    blocks = tl.cdiv(CHANNELS, BLOCK)
    segments = tl.cdiv(length, segment)
    place = tl.program_id(0) // blocks
    begin = place % segments * segment
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (place // segments).to(tl.int64), place % segments, begin, tl.minimum(begin + segment, length), e


@triton.jit
def scan_forward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial,
    flags,
    ends,
    decays,
    y,
    last,
    checkpoints,
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
    AHEAD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    FLAGS: tl.constexpr,
    TRAIN: tl.constexpr,
):
    """Computes `y (b, t, e)`, `last (b, e, n)` and, with TRAIN, the states before every EVERY-th token.

    These are the `checkpoints (b, ceil(t / EVERY), e, n)`. `u`, `delta`, `z`: (b, t, e), each with its own stride per
    token. `A`: (e, n). `B`, `C`: (b, t, n). `initial`: (b, e, n). `ends`, `decays`: (b, segments, e, n) of `scan_ends`.
    """
    b, number, begin, end, e = _place(length, segment, CHANNELS, BLOCK)
    t = tl.arange(0, COUNT)
    n = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    ok = e < CHANNELS
    here = (n < STATES)[:, :, None] & ok[None, None, :]
    state = n[:, :, None] + e[None, None, :] * STATES
    A2 = tl.load(A + state, mask=here, other=0.0) * LOG2E
    h = tl.zeros([LANES, EACH, BLOCK], tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial + b * CHANNELS * STATES + state, mask=here, other=0.0)
    for before in range(number):
        part = (b * tl.cdiv(length, segment) + before) * CHANNELS * STATES + state
        decay = tl.load(decays + part, mask=here, other=0.0)
        h = _combined(decay, h, tl.load(ends + part, mask=here, other=0.0), FLAGS)
    skip = tl.load(D + e, mask=ok, other=0.0) if HAS_D else tl.zeros([BLOCK], tl.float32)
    shift = tl.load(bias + e, mask=ok, other=0.0) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)

    first, left = b * length + begin, end - begin
    u += first * U_ROW
    delta += first * DELTA_ROW
    z += first * Z_ROW
    y += first * CHANNELS
    B += first * STATES
    C += first * STATES
    flags += first
    checkpoints += (b * tl.cdiv(length, EVERY) + begin // EVERY) * CHANNELS * STATES
    EVEN: tl.constexpr = CHANNELS % BLOCK == 0
    full = left // COUNT * COUNT
    # Prefetches AHEAD tiles from memory. B and C are shared by all channels and in the cache: one tile suffices.
    queue = ()
    for k in tl.static_range(AHEAD):
        at = tl.minimum(k * COUNT, tl.maximum(full - COUNT, 0)).to(tl.int64)
        queue = queue + (_gathered(u, delta, z, at, t, e, full, U_ROW, DELTA_ROW, Z_ROW, CHANNELS, HAS_Z, False),)
    next_marks = _marks(flags, left, COUNT, FLAGS)
    next_B = _states(B, next_marks, n, left, STATES, COUNT, FLAGS, False)
    next_C = _states(C, next_marks, n, left, STATES, COUNT, FLAGS, False)
    ready = _prepared(queue[0], shift, flags, t, COUNT, SOFTPLUS, HAS_Z, FLAGS, True)
    queue = queue[1:]
    for at in range(0, full, COUNT):
        if TRAIN:
            if at % EVERY == 0:
                tl.store(checkpoints + at // EVERY * (CHANNELS * STATES) + state, h, mask=here)
        steps, driven, x, share = ready
        now_B, now_C, marks = next_B, next_C, next_marks
        # The last steps load the last tile again.
        far = tl.minimum(at + AHEAD * COUNT, full - COUNT).to(tl.int64)
        near = tl.minimum(at + COUNT, full - COUNT)
        ready = _prepared(queue[0], shift, flags + near, t, COUNT, SOFTPLUS, HAS_Z, FLAGS, True)
        following = _gathered(u, delta, z, far, t, e, COUNT, U_ROW, DELTA_ROW, Z_ROW, CHANNELS, HAS_Z, EVEN)
        queue = queue[1:] + (following,)
        next_marks = _marks(flags + near, COUNT, COUNT, FLAGS)
        next_B = _states(B + near.to(tl.int64) * STATES, next_marks, n, COUNT, STATES, COUNT, FLAGS, True)
        next_C = _states(C + near.to(tl.int64) * STATES, next_marks, n, COUNT, STATES, COUNT, FLAGS, True)
        h, out = _recurred(h, steps, driven, now_B, now_C, A2, marks, t, FLAGS)
        to = y + tl.cast(at, tl.int64) * CHANNELS
        _finish(out, x, share, skip, to, flags + at, t, e, COUNT, CHANNELS, HAS_Z, FLAGS, EVEN)
    rest = left - full
    if rest > 0:
        if TRAIN:
            if full % EVERY == 0:
                tl.store(checkpoints + full // EVERY * (CHANNELS * STATES) + state, h, mask=here)
        at_end = full.to(tl.int64)
        end_tile = _gathered(u, delta, z, at_end, t, e, rest, U_ROW, DELTA_ROW, Z_ROW, CHANNELS, HAS_Z, False)
        end_marks = _marks(flags + full, rest, COUNT, FLAGS)
        end_B = _states(B + at_end * STATES, end_marks, n, rest, STATES, COUNT, FLAGS, False)
        end_C = _states(C + at_end * STATES, end_marks, n, rest, STATES, COUNT, FLAGS, False)
        steps, driven, x, share = _prepared(end_tile, shift, flags + full, t, rest, SOFTPLUS, HAS_Z, FLAGS, False)
        h, end_out = _recurred(h, steps, driven, end_B, end_C, A2, end_marks, t, FLAGS)
        to = y + at_end * CHANNELS
        _finish(end_out, x, share, skip, to, flags + full, t, e, rest, CHANNELS, HAS_Z, FLAGS, False)
    if end == length:
        tl.store(last + b * CHANNELS * STATES + state, h, mask=here)

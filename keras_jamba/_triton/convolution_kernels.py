"""The causal depthwise convolution with bias and SiLU on a GPU, in Triton.

A program processes BLOCK channels of RUNS consecutive runs of STRIP tokens, as one tile (RUNS, BLOCK) per token of a
run. A thread holds 16 bytes of neighbouring channels and keeps the last K - 1 inputs of its run in registers. So it
reads every input once, except those at the ends of a run. It loads COUNT tokens while it computes the COUNT before.

There are no residuals: the backward pass recomputes the sums before SiLU. A token's gradient is complete K - 1 tokens
later, so a run reads K - 1 tokens past its end. A program sums the gradients of the weights over its tokens, and
another kernel adds these sums in a fixed order.
"""

# Triton compiles these functions, and its types are not those of Python.
# mypy: ignore-errors

import triton
import triton.language as tl

from keras_jamba._triton.function_kernels import _sigmoid


@triton.jit
def _place(length, CHANNELS: tl.constexpr, RUNS: tl.constexpr, STRIP: tl.constexpr, BLOCK: tl.constexpr):
    """Returns this program's row, its first token, the first token of each of its runs, and its channels."""
    blocks = tl.cdiv(CHANNELS, BLOCK)
    place = tl.program_id(0) // blocks
    parts = tl.cdiv(length, RUNS * STRIP)
    begin = place % parts * (RUNS * STRIP)
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (place // parts).to(tl.int64), begin, begin + tl.arange(0, RUNS) * STRIP, e


@triton.jit
def _offsets(e, RUNS: tl.constexpr, STRIP: tl.constexpr, ROW: tl.constexpr):
    return tl.arange(0, RUNS)[:, None] * (STRIP * ROW) + e[None, :]


@triton.jit
def _channels(e, CHANNELS: tl.constexpr):
    return (e < CHANNELS)[None, :]


@triton.jit
def _at(pointer, order, t, i, e, length, ROW: tl.constexpr, STRIP: tl.constexpr, ORDER: tl.constexpr):
    """Returns the addresses (RUNS, BLOCK) of the tokens `i` after those of `t (RUNS,)`.

    `pointer` is that of the program's first token. With ORDER it is that of the row, and tokens count in that order.
    """
    if ORDER:
        place = tl.load(order + t + i, mask=(t + i >= 0) & (t + i < length), other=0).to(tl.int64)
        return pointer + place[:, None] * ROW + e[None, :]
    else:
        return pointer + i * ROW + _offsets(e, t.shape[0], STRIP, ROW)


@triton.jit
def _next(
    pointer,
    order,
    t,
    at,
    e,
    end,
    length,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIP: tl.constexpr,
    COUNT: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Loads COUNT tiles of tokens, the first of which are `at` after `t (RUNS,)`; zeros from token `end` on."""
    found = ()
    for i in tl.static_range(COUNT):
        here = (t + at + i < end)[:, None] & _channels(e, CHANNELS)
        place = _at(pointer, order, t, at + i, e, length, ROW, STRIP, ORDER)
        found = found + (tl.load(place, mask=here, other=0),)
    return found


@triton.jit
def _reaches(begins, t, length, STRIP: tl.constexpr, COUNT: tl.constexpr, BEGINS: tl.constexpr):
    """Loads how far each of COUNT tokens reaches back: tiles (RUNS, 1)."""
    found = ()
    for i in tl.static_range(COUNT):
        if BEGINS:
            here = (t + i < length)[:, None]
            place = begins + i + tl.arange(0, t.shape[0])[:, None] * STRIP
            found = found + (tl.load(place, mask=here, other=0),)
        else:
            found = found + (0,)
    return found


@triton.jit
def _before(
    x,
    order,
    initial,
    b,
    t,
    e,
    real,
    length,
    K: tl.constexpr,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIP: tl.constexpr,
    INITIAL: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Loads the K - 1 inputs before each run, the oldest first; before the row those of `initial`, or zeros."""
    found = ()
    for i in tl.static_range(K - 1):
        back = K - 1 - i
        inside = ((t >= back) & (t - back < real))[:, None] & _channels(e, CHANNELS)
        place = _at(x, order, t, -back, e, length, ROW, STRIP, ORDER)
        row = tl.load(place, mask=inside, other=0).to(tl.float32)
        if INITIAL:
            # Only for t = 0, because runs are at least K - 1 tokens long.
            place = initial + (b * (K - 1) + i) * CHANNELS + e[None, :] + tl.zeros_like(t)[:, None]
            first = tl.load(place, mask=(t == 0)[:, None] & _channels(e, CHANNELS), other=0).to(tl.float32)
            row = tl.where((t == 0)[:, None], first, row)
        found = found + (row,)
    return found


@triton.jit
def _weights(kernel, bias, e, K: tl.constexpr, CHANNELS: tl.constexpr, BIAS: tl.constexpr):
    """Loads the K rows of the kernel, and the bias, each (1, BLOCK)."""
    found = ()
    for i in tl.static_range(K):
        found = found + (tl.load(kernel + i * CHANNELS + e, mask=e < CHANNELS, other=0.0)[None, :],)
    if BIAS:
        shift = tl.load(bias + e, mask=e < CHANNELS, other=0.0)[None, :]
    else:
        shift = tl.zeros([1, e.shape[0]], tl.float32)
    return found, shift


@triton.jit
def _reached(window, reach, BEGINS: tl.constexpr, K: tl.constexpr):
    """Returns the window with zeros for tokens of other documents."""
    if BEGINS:
        found = ()
        for i in tl.static_range(K):
            found = found + (tl.where(reach >= K - 1 - i, window[i], 0.0),)
        return found
    else:
        return window


@triton.jit
def _sum(window, weights, shift, K: tl.constexpr):
    total = shift + weights[K - 1] * window[K - 1]
    for i in tl.static_range(K - 1):
        total += weights[K - 2 - i] * window[K - 2 - i]
    return total


@triton.jit
def _started(pointer, b, begin, length, ROW: tl.constexpr, ORDER: tl.constexpr):
    """Returns the pointer of the program's first token; with ORDER that of the row."""
    first = b * length if ORDER else b * length + begin
    return pointer + first * ROW


@triton.jit
def convolution_forward(
    x,
    kernel,
    bias,
    initial,
    begins,
    order,
    counts,
    y,
    length,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROW: tl.constexpr,
    FIRST: tl.constexpr,
    RUNS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    INITIAL: tl.constexpr,
    BEGINS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Computes `y (b, t, e)` from `x (b, t, ROW)`, whose channels begin at FIRST.

    `kernel`: (w, e) and `bias`: (e,), float32, with w = K. `initial`: (b, w - 1, e). `begins`: (b, t) int32, how many
    of the w - 1 tokens before it a token's window reaches. With ORDER, tokens count in the `order (b, t)` int32, of
    which the first `counts (b,)` are real; `y` is zero at the others.
    """
    b, begin, t, e = _place(length, CHANNELS, RUNS, STRIP, BLOCK)
    x = _started(x + FIRST, b, begin, length, ROW, ORDER)
    y = _started(y, b, begin, length, CHANNELS, ORDER)
    begins += b * length + begin
    order += b * length
    real = tl.load(counts + b) if ORDER else length
    rows = _next(x, order, t, 0, e, real, length, ROW, CHANNELS, STRIP, COUNT, ORDER)
    window = _before(x, order, initial, b, t, e, real, length, K, ROW, CHANNELS, STRIP, INITIAL, ORDER)
    weights, shift = _weights(kernel, bias, e, K, CHANNELS, BIAS)
    for at in range(0, STRIP, COUNT):
        now, far = rows, at + COUNT
        end = tl.where(far < STRIP, real, 0)
        rows = _next(x, order, t, far, e, end, length, ROW, CHANNELS, STRIP, COUNT, ORDER)
        reaches = _reaches(begins + at, t + at, length, STRIP, COUNT, BEGINS)
        for i in tl.static_range(COUNT):
            window = window + (now[i].to(tl.float32),)
            total = _sum(_reached(window, reaches[i], BEGINS, K), weights, shift, K)
            if SILU:
                total = total * _sigmoid(total)
            if ORDER:
                total = tl.where((t + (at + i) < real)[:, None], total, 0.0)
            here = (t + (at + i) < length)[:, None] & _channels(e, CHANNELS)
            place = _at(y, order, t, at + i, e, length, CHANNELS, STRIP, ORDER)
            tl.store(place, total.to(y.dtype.element_ty), mask=here)
            window = window[1:]


@triton.jit
def _gradient_of_sum(window, weights, shift, grad, K: tl.constexpr, SILU: tl.constexpr):
    grad = grad.to(tl.float32)
    if SILU:
        total = _sum(window, weights, shift, K)
        open = _sigmoid(total)
        grad *= open * (1 + total * (1 - open))
    return grad


@triton.jit
def _given(due, weights, grad, reach, K: tl.constexpr, BEGINS: tl.constexpr):
    """Adds this token's contribution to the gradients of the K inputs of its window, the oldest first."""
    found = ()
    for i in tl.static_range(K - 1):
        found = found + (due[i] + weights[i] * (tl.where(reach >= K - 1 - i, grad, 0.0) if BEGINS else grad),)
    return found + (weights[K - 1] * grad,)


@triton.jit
def convolution_backward(
    grad_y,
    x,
    kernel,
    bias,
    initial,
    begins,
    order,
    counts,
    grad_x,
    parts,
    grad_initial,
    length,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROW: tl.constexpr,
    FIRST: tl.constexpr,
    RUNS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    INITIAL: tl.constexpr,
    BEGINS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Computes `grad_x (b, t, e)`, `grad_initial (b, w - 1, e)` and `parts (programs per channel, w + 1, e)`.

    w is K. `parts` holds each program's sums for the gradients of the kernel (w rows) and the bias (the last row).
    """
    b, begin, t, e = _place(length, CHANNELS, RUNS, STRIP, BLOCK)
    x = _started(x + FIRST, b, begin, length, ROW, ORDER)
    grad_y = _started(grad_y, b, begin, length, CHANNELS, ORDER)
    grad_x = _started(grad_x, b, begin, length, CHANNELS, ORDER)
    begins += b * length + begin
    order += b * length
    real = tl.load(counts + b) if ORDER else length
    rows = _next(x, order, t, 0, e, real, length, ROW, CHANNELS, STRIP, COUNT, ORDER)
    grads = _next(grad_y, order, t, 0, e, real, length, CHANNELS, CHANNELS, STRIP, COUNT, ORDER)
    window = _before(x, order, initial, b, t, e, real, length, K, ROW, CHANNELS, STRIP, INITIAL, ORDER)
    weights, shift = _weights(kernel, bias, e, K, CHANNELS, BIAS)
    sums, due, total = (), (), tl.zeros([RUNS, BLOCK], tl.float32)
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros([RUNS, BLOCK], tl.float32),)
    for _ in tl.static_range(K - 1):
        due = due + (tl.zeros([RUNS, BLOCK], tl.float32),)
    for at in range(0, STRIP, COUNT):
        now, now_grads, far = rows, grads, at + COUNT
        rows = _next(x, order, t, far, e, real, length, ROW, CHANNELS, STRIP, COUNT, ORDER)
        grads = _next(grad_y, order, t, far, e, real, length, CHANNELS, CHANNELS, STRIP, COUNT, ORDER)
        reaches = _reaches(begins + at, t + at, length, STRIP, COUNT, BEGINS)
        for i in tl.static_range(COUNT):
            window = window + (now[i].to(tl.float32),)
            seen = _reached(window, reaches[i], BEGINS, K)
            grad = _gradient_of_sum(seen, weights, shift, now_grads[i], K, SILU)
            more = ()
            for j in tl.static_range(K):
                more = more + (sums[j] + seen[j] * grad,)
            sums, total = more, total + grad
            due = _given(due, weights, grad, reaches[i], K, BEGINS)
            # The gradient of the token K - 1 before, in this run or, before the row, in `initial`.
            place = at + (i - K + 1)
            here = ((t + place < length) & (place >= 0))[:, None] & _channels(e, CHANNELS)
            to = _at(grad_x, order, t, place, e, length, CHANNELS, STRIP, ORDER)
            tl.store(to, due[0].to(grad_x.dtype.element_ty), mask=here)
            if INITIAL and i < K - 1:
                if at == 0:
                    where = grad_initial + (b * (K - 1) + i) * CHANNELS + e[None, :] + tl.zeros_like(t)[:, None]
                    here = (t == 0)[:, None] & _channels(e, CHANNELS)
                    tl.store(where, due[0].to(grad_initial.dtype.element_ty), mask=here)
            window, due = window[1:], due[1:]
    # Tokens after the run contribute to the gradients of its last tokens.
    reaches = _reaches(begins + STRIP, t + STRIP, length, STRIP, COUNT, BEGINS)
    for i in tl.static_range(K - 1):
        window = window + (rows[i].to(tl.float32),)
        seen = _reached(window, reaches[i], BEGINS, K)
        grad = _gradient_of_sum(seen, weights, shift, grads[i], K, SILU)
        due = _given(due, weights, grad, reaches[i], K, BEGINS)
        place = STRIP - K + 1 + i
        here = (t + place < length)[:, None] & _channels(e, CHANNELS)
        to = _at(grad_x, order, t, place, e, length, CHANNELS, STRIP, ORDER)
        tl.store(to, due[0].to(grad_x.dtype.element_ty), mask=here)
        window, due = window[1:], due[1:]
    parts += (tl.program_id(0) // tl.cdiv(CHANNELS, BLOCK)).to(tl.int64) * ((K + 1) * CHANNELS)
    for j in tl.static_range(K):
        tl.store(parts + j * CHANNELS + e, tl.sum(sums[j], 0), mask=e < CHANNELS)
    tl.store(parts + K * CHANNELS + e, tl.sum(total, 0), mask=e < CHANNELS)


@triton.jit
def convolution_sums(parts, sums, count, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Computes `sums (COLUMNS,)`, the sum over the first axis of `parts (count, COLUMNS)`."""
    r = tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for at in range(0, count, ROWS):
        here = (r + at < count)[:, None] & (column < COLUMNS)[None, :]
        total += tl.load(parts + (r + at).to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=here, other=0.0)
    tl.store(sums + column, tl.sum(total, 0), mask=column < COLUMNS)

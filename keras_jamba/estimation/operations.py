"""Floating-point operations of the layers, forward and backward.

A multiply-add counts as two operations. Exponentials and similar functions count as none, as in XLA's count. XLA
counts a GELU's erf as its polynomial on a CPU, some 60 operations.

Scores behind a causal mask count, because only some kernels skip them. Recomputation that saves memory inside a scan or
inside attention does not count.
"""

from typing import NamedTuple

from keras_jamba.estimation._plan import encoder_convolutions, ends_residual_block
from keras_jamba.ops.attention.dense import MOST_PAIRS
from keras_jamba.ops.attention.fused import FEW_PAIRS
from keras_jamba.ops.attention.triton import FEW_QUERIES

# Operations per number, forward and backward. SwiGLU includes the product with the other half.
_SILU, _SWIGLU, _GELU = (4, 6), (5, 8), (4, 8)
_SOFTMAX = (6, 5)
_BATCH_NORM = (8, 12)
_BIAS = (1, 1)
_BLOCK = 256  # tokens per block of queries and of keys in attention


class Flops(NamedTuple):
    """The number of operations, forward and backward."""

    forward: int
    backward: int

    def __add__(self, other):
        return Flops(self.forward + other.forward, self.backward + other.backward)


def matmul(rows, width, columns):
    """Counts `(rows, width)` times `(width, columns)`. The backward pass has two such products."""
    count = 2 * rows * width * columns
    return Flops(count, 2 * count)


def _each(count, forward, backward):
    """Counts `forward` and `backward` operations for each of `count` numbers."""
    return Flops(count * forward, count * backward)


def _norm(rows, width):
    """Counts an RMSNorm: square, sum, divide by the root, scale."""
    return _each(rows * width, 4, 9)


def scan_flops(batch_size: int, length: int, channels: int, d_state: int) -> Flops:
    """Returns the operations of `selective_scan` with skip, gate, bias and softplus, counted by hand.

    Forward, per token, channel and state: `delta A` 1; `(delta u) B` 1; decay times state 1; its sum with the input 1;
    the product with C 1; the sum over states 1. Forward, per token and channel: `delta u` 1, less 1, because n numbers
    have n - 1 sums; `D u` and its sum 2; SiLU of the gate 4, and its product 1; bias 1; softplus 6.

    Backward, per token, channel and state: gradient of the state 2; of C 2; of B 2; of `delta u` 2; of the decay 1; of
    the exponential 1; of delta 2; of A 2; of the previous state 1. Each product with a sum counts 2. Backward, per
    token and channel: `delta u` 3, less 2 for two sums over states; `D u` 4; gate 8; bias and softplus 7.

    Args:
        batch_size: sequences b.
        length: tokens t per sequence.
        channels: channels e.
        d_state: states n per channel.

    Returns:
        `(forward, backward)`, a pair of integers. Exponentials do not count. States that the kernels recompute in the
        backward pass do not count either.
    """
    points = batch_size * length * channels
    return Flops(points * (6 * d_state + 14), points * (15 * d_state + 20))


def block(run, plan, mixer, feed_forward):
    part = _norm(run.s, plan.d) + _each(run.s * plan.d, 1, 1)
    parts = part if feed_forward is None else part + part
    return parts + _MIXERS[mixer](run, plan) + _FEED_FORWARDS[feed_forward](run, plan)


def _mamba(run, plan):
    s, e, n, r = run.s, plan.e, plan.n, plan.r
    ssm = matmul(s, e, r + 2 * n) + matmul(s, r, e) + scan_flops(run.b, run.t, e, n)
    return _gated(run, plan, ssm + _norm(s, r + 2 * n) if plan.config["mixer_rms_norm"] else ssm)


def _gated_conv(run, plan):
    return _gated(run, plan, _each(run.s * plan.e, *_SWIGLU))


def _gated(run, plan, inner):
    """Counts projections, convolutions and `inner`, the operations after each direction's convolution with the gate."""
    s, d, e, w = run.s, plan.d, plan.e, plan.w
    direction = _each(s * e, 2 * w, 4 * w) + _each(s * e, *_SILU) + inner
    both = direction + direction + _each(s * e, 1, 1) if plan.directions == 2 else direction
    return matmul(s, d, 2 * e) + both + matmul(s, e, d)


def _attention(run, plan):
    s, d, kv = run.s, plan.d, plan.g * plan.c
    queries, keys = attended(run, plan)
    scores = run.b * plan.h * queries * keys
    total = matmul(s, d, d + 2 * kv) + matmul(s, d, d) + _each(scores, *_SOFTMAX)
    total += matmul(scores, plan.c, 1) + matmul(scores, plan.c, 1)
    return total + _each(s * (d + kv), 3, 3) if plan.config["use_rope"] else total


def attended(run, plan):
    """Returns the queries, and the keys per query."""
    if not attends_in_blocks(run, plan):
        return run.t, run.t
    # A block of queries reads the blocks that its first and last window reach.
    window = plan.config["attention_window"]
    return run.t, min(run.t, plan.directions * window + 2 * _BLOCK)


def attends_in_blocks(run, plan):
    """Returns whether attention with a window is computed in blocks, without the pairs that the window hides."""
    few = FEW_PAIRS if run.platform == "cpu" else FEW_QUERIES**2 if run.scan == "triton" else MOST_PAIRS
    return plan.config["attention_window"] is not None and run.t * run.t > few


def _perceptron(plan, rows):
    d, f = plan.d, plan.f
    if plan.config["use_swiglu"]:
        return matmul(rows, d, 2 * f) + _each(rows * f, *_SWIGLU) + matmul(rows, f, d)
    return matmul(rows, d, f) + _each(rows * f, *_GELU) + matmul(rows, f, d)


def _dense(run, plan):
    return _perceptron(plan, run.s)


def _moe(run, plan):
    assignments = run.s * plan.chosen
    router = matmul(run.s, plan.d, plan.x) + _each(run.s * plan.x, 8, 8)
    return router + _perceptron(plan, assignments) + _each(assignments * plan.d, 2, 3)


_MIXERS = {"mamba": _mamba, "gated_conv": _gated_conv, "attention": _attention}
_FEED_FORWARDS = {"dense": _dense, "moe": _moe, None: lambda run, plan: Flops(0, 0)}


def encoder(run, plan):
    total = Flops(0, 0)
    for i, (channels, width, side, stride) in enumerate(encoder_convolutions(plan)):
        before, after = run.grid[i : i + 2]
        taps = run.images * _taps(before[0], side, stride) * _taps(before[1], side, stride)
        product = matmul(taps, channels, width)
        if i == 0:
            # Pixels need no gradient.
            product = Flops(product.forward, product.forward)
        pixels = run.images * after[0] * after[1]
        total += product + _after_convolution(plan, pixels, width)
        if ends_residual_block(plan, i):
            total += _each(pixels * width, 1, 1)
    return total


def _after_convolution(plan, pixels, width):
    if plan.image.stem == "patchify":
        return _each(pixels * width, *_BIAS) + _norm(pixels, width)
    return _each(pixels * width, *_BATCH_NORM) + _each(pixels * width, *_SILU)


def _taps(size, side, stride):
    """Counts pairs of an output and a pixel under its kernel along one axis, with "same" padding."""
    outputs = -(-size // stride)
    before = max((outputs - 1) * stride + side - size, 0) // 2
    starts = (i * stride - before for i in range(outputs))
    return sum(min(start + side, size) - max(start, 0) for start in starts)


def tokens(run, plan):
    """Counts for frames the projection of features and positions, its SiLU and the mean over cells."""
    if plan.image.tokens != "frames":
        return Flops(0, 0)
    numbers = run.cells * plan.d
    projection = matmul(run.cells, plan.d + 2, plan.d) + _each(numbers, *_BIAS)
    return projection + _each(numbers, *_SILU) + _each(numbers, 1, 1)


def readout(run, plan):
    """Counts for "seqpool" scores, their softmax over time and the weighted sum. Tokens get gradients from both."""
    if plan.image.readout == "last":
        return Flops(0, 0)
    if plan.image.readout == "mean":
        return _each(run.s * plan.d, 1, 1)
    # The product of a score's gradient and the kernel has no sums.
    return matmul(run.s, plan.d, 1) + _each(run.s, *_SOFTMAX) + _each(run.s * plan.d, 2, 4 - 1)


def final_norm(run, plan):
    return _norm(run.s, plan.d)


def head(run, plan):
    if plan.image:
        return matmul(run.b, plan.d, plan.image.num_classes)
    return matmul(run.s, plan.d, plan.vocabulary[0])


def embedding(run, plan):
    """Counts the addition of the rows' gradients to the table's. The lookup itself is free."""
    return _each(run.s * plan.d, 0, 1)

"""Kernels of the cross-entropy of logits, in float32: one pass for the losses, one for the gradient."""

import triton
import triton.language as tl

from keras_jamba._triton.function_kernels import LN2, LOG2E


@triton.jit
def cross_entropy_of_rows(
    logits,
    targets,
    logs,
    losses,
    predicted,
    classes,
    BLOCK: tl.constexpr,
):
    """Computes per row the logarithm of the sum of exponentials, the loss, and the first of the largest logits.

    The sum is relative to the largest logit so far. An infinite one is not subtracted: infinity less itself is NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    most, total, best = -float("inf"), 0.0, 0
    for first in range(0, classes, BLOCK):
        values = tl.load(logits + row * classes + first + column, mask=first + column < classes, other=-float("inf"))
        of_block = tl.max(values, 0)
        place = tl.argmax(values, 0)
        best = tl.where(of_block > most, first + place, best)
        largest = tl.maximum(most, of_block)
        shift = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
        before = tl.where(tl.abs(most) < float("inf"), most, 0.0)
        # Nothing to rescale before the first finite logit.
        scaled = tl.where(total == 0.0, 0.0, total * tl.exp2((before - shift) * LOG2E))
        total = scaled + tl.sum(tl.exp2((values - shift) * LOG2E), 0)
        most = largest
    log = tl.where(tl.abs(most) < float("inf"), most, 0.0) + tl.log2(total) * LN2
    of_target = tl.load(logits + row * classes + tl.load(targets + row))
    tl.store(logs + row, log)
    tl.store(losses + row, log - of_target)
    tl.store(predicted + row, best)


@triton.jit
def cross_entropy_gradient(
    logits,
    logs,
    targets,
    factors,
    grads,
    classes,
    BLOCK: tl.constexpr,
):
    """Computes `factors (exp(logits - logs) - is_target)`, one tile of a row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < classes
    values = tl.load(logits + row * classes + column, mask=there, other=0.0)
    shares = tl.exp2((values - tl.load(logs + row)) * LOG2E)
    shares = tl.where(column == tl.load(targets + row), shares - 1.0, shares) * tl.load(factors + row)
    tl.store(grads + row * classes + column, shares.to(grads.dtype.element_ty), mask=there)

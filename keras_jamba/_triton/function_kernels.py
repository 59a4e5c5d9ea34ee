"""Exponential functions of the kernels, in float32."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2E))


@triton.jit
def _softplus(x):
    """Computes log(1 + exp(x)) in float32: log1p(w) = 2 artanh(w / (2 + w)) with w = exp(-|x|), as a series."""
    w = tl.exp2(tl.abs(x) * -LOG2E)
    s = w / (2 + w)
    q = s * s
    series = 1.0 + q * (0.33333206 + q * (0.20010847 + q * (0.13999623 + q * 0.14011951)))
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def _wait_for_inputs(OVERLAPS: tl.constexpr):
    """Waits until the last kernel has written its results.

    A kernel that is launched with `launch_pdl` may start before. Before this call, it may read weights only.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _let_next_start(OVERLAPS: tl.constexpr):
    """Lets the next kernel start and read its weights, when all programs of this one have arrived here."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()

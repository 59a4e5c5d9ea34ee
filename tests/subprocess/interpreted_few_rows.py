"""The kernels for few tokens in Triton's interpreter on a CPU, against float64.

Runs in its own process: KERAS_BACKEND=torch TRITON_INTERPRET=1 python tests/subprocess/interpreted_few_rows.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "helpers")]
import triton_on_cpu  # noqa: E402

from keras_jamba._backend.torch import _triton  # noqa: E402
from keras_jamba._triton import few_rows  # noqa: E402

GPU = _triton._gpu(triton_on_cpu.launch)
RNG = np.random.default_rng(0)
EPSILON = 1e-3


def normal(*shape, dtype=torch.float16):
    return torch.tensor(RNG.standard_normal(shape)).to(dtype)


def close(found, expected, name, dtype=torch.float16):
    assert found.dtype == dtype and found.shape == expected.shape, name
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype] * float(expected.abs().max())
    np.testing.assert_allclose(found.double().numpy(), expected.numpy(), rtol=0, atol=tolerance, err_msg=name)


def sliced(rows, width):
    """Returns `(rows, width)` as a slice of a wider array, with NaN around it."""
    wider = torch.full((rows, width + 5), torch.nan, dtype=torch.float16)
    wider[:, 3 : 3 + width] = normal(rows, width)
    return wider[:, 3 : 3 + width], width + 5


def silu(x):
    return x * torch.sigmoid(x)


def check_product(rows, k, n, plan):
    x, row = sliced(rows, k)
    matrix, gate = normal(k, n) / k**0.5, normal(k, n) / k**0.5
    exact = x.double() @ matrix.double()
    close(few_rows.product(GPU, x, row, matrix, plan=plan), exact, f"product {rows} {k} {n}")
    found = few_rows.product(GPU, x, row, matrix, gate=gate, plan=plan)
    close(found, silu(x.double() @ gate.double()) * exact, f"gated product {rows} {k} {n}")
    values, others = (torch.tensor(RNG.integers(-127, 128, (k, n)).astype("int8")) for _ in range(2))
    divisor, other = (torch.tensor(RNG.uniform(200, 900, n).astype("float32")) for _ in range(2))
    exact = x.double() @ values.double() / divisor.double()
    found = few_rows.product(GPU, x, row, values, divisor=divisor, plan=plan)
    close(found, exact, f"int8 product {rows} {k} {n}")
    given = dict(gate=others, divisor=divisor, gate_divisor=other, plan=plan)
    exact = silu(x.double() @ others.double() / other.double()) * exact
    close(few_rows.product(GPU, x, row, values, **given), exact, f"gated int8 {rows} {k} {n}")


def normed(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * scale.double()


def check_added_norm(rows, width, dtype):
    x, other, scale = (normal(*shape, dtype=dtype) for shape in ((rows, width), (rows, width), (width,)))
    total, y = few_rows.added_norm(GPU, x, scale, EPSILON, other)
    close(total, x.double() + other.double(), f"sum {rows} {width}", dtype)
    close(y, normed(total.double(), scale), f"norm of sum {rows} {width}", dtype)
    same, y = few_rows.added_norm(GPU, x, scale, EPSILON)
    assert same is x
    close(y, normed(x.double(), scale), f"norm {rows} {width}", dtype)


def check_norms_of_slices(rows, widths):
    x, row = sliced(rows, sum(widths))
    scales = [normal(width) for width in widths]
    parts = x.double().split(widths, dim=1)
    exact = torch.cat([normed(part, scale) for part, scale in zip(parts, scales, strict=True)], dim=1)
    close(few_rows.norms_of_slices(GPU, x, row, scales, EPSILON), exact, f"norms of slices {rows} {widths}")


def check_convolution(rows, width, channels, with_bias, with_silu):
    x, row = sliced(rows, channels)
    kernel, state = normal(width, channels), normal(rows, width - 1, channels)
    bias = normal(channels, dtype=torch.float32) if with_bias else None
    y, after = few_rows.convolution_step(GPU, x, row, kernel, bias, state, with_silu)
    window = torch.cat([state, x[:, None]], dim=1)
    exact = (window.double() * kernel.double()).sum(1) + (bias.double() if with_bias else 0)
    close(y, silu(exact) if with_silu else exact, f"convolution {rows} {width} {channels}")
    assert torch.equal(after, window[:, 1:])


for rows, k, n, plan in ((1, 40, 20, (16, 16, 4, 1)), (3, 40, 20, (16, 16, 4, 1)), (16, 70, 33, (32, 16, 4, 1))):
    check_product(rows, k, n, few_rows.Plan(*plan))
for rows, k, n in ((1, 48, 20), (1, 600, 24), (2, 600, 24), (1, 600, 1030), (2, 600, 1030)):
    check_product(rows, k, n, None)
for rows, widths in ((1, (7, 4, 4)), (3, (160, 16, 16)), (2, (1, 2, 3))):
    check_norms_of_slices(rows, widths)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    check_added_norm(3, 20, dtype)
    check_added_norm(1, 2049, dtype)
for rows, width, channels in ((1, 4, 20), (3, 2, 300), (2, 8, 5)):
    for given in ((True, True), (False, False)):
        check_convolution(rows, width, channels, *given)

print("all are equal")

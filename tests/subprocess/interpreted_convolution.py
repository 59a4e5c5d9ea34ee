"""The kernels of the convolution and of the scan's one-token step in Triton's interpreter, against float64.

Runs on a CPU, in its own process:
KERAS_BACKEND=torch TRITON_INTERPRET=1 python tests/subprocess/interpreted_convolution.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "helpers")]
import oracles  # noqa: E402
from triton_on_cpu import launch  # noqa: E402

from keras_jamba._backend.torch import _triton  # noqa: E402
from keras_jamba._triton import convolution, step  # noqa: E402
from keras_jamba.ops.convolution import portable, triton  # noqa: E402

# Several programs per row, and strips of several steps.
TILE = convolution.Tile(block=16, runs=2, strip=16, count=8, warps=1)

GPU = _triton._gpu(launch)


def close(actual, expected, name, rounded=False):
    expected = np.asarray(expected)
    actual = actual.to(torch.float64).numpy()
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    rtol, atol = (1e-2, 4e-3) if rounded else (1e-4, 1e-5)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol * np.abs(expected).max(initial=0), err_msg=name)


def normal(rng, *shape, dtype=torch.float32):
    return torch.tensor(rng.standard_normal(shape)).to(dtype)


def inside_a_wider_array(x, before, after):
    """Returns `x` as columns of a wider array, with `before` and `after` columns of NaN around them."""
    others = [torch.full((*x.shape[:-1], width), torch.nan, dtype=x.dtype) for width in (before, after)]
    return convolution.Columns(torch.cat([others[0], x, others[1]], -1), first=before)


def silu(x):
    return x / (1 + np.exp(-x))


def reference(x, kernel, bias, initial, begins, activated):
    """Computes each output by its definition in PyTorch float64, which supplies gradients."""
    k, length = len(kernel), x.shape[1]
    window = torch.cat([initial, x], 1)
    y = bias
    for i in range(k):
        reached = (begins >= k - 1 - i)[..., None]
        y = y + torch.where(reached, kernel[i] * window[:, i : i + length], 0.0)
    return torch.nn.functional.silu(y) if activated else y


def documents(rng, b, t, k):
    """Returns how many earlier tokens each window reaches, with random document starts."""
    new = rng.random((b, t)) < 0.2
    begins = np.empty((b, t), "int32")
    for row, at in np.ndindex(b, t):
        before = k - 1 if at == 0 else begins[row, at - 1] + 1
        begins[row, at] = 0 if new[row, at] else min(before, k - 1)
    return torch.tensor(begins)


def check_convolution(b, t, e, k, *, has=(), dtype=torch.float32, activated=True, tile=None):
    name = f"b {b}, t {t}, e {e}, k {k}, {has}, {dtype}, silu {activated}: "
    rng = np.random.default_rng(t)
    x, grad_y = normal(rng, b, t, e, dtype=dtype), normal(rng, b, t, e, dtype=dtype)
    real = torch.tensor(rng.random((b, t)) < 0.7) if "padding" in has else torch.ones(b, t, dtype=torch.bool)
    order = torch.argsort(~real, dim=1, stable=True).int()
    kernel, bias, initial = normal(rng, k, e), normal(rng, e), normal(rng, b, k - 1, e, dtype=dtype)
    begins = documents(rng, b, t, k)
    given = dict(
        bias=bias if "bias" in has else None,
        initial=initial if "initial" in has else None,
        begins=begins if "documents" in has else None,
        order=order if "padding" in has else None,
        counts=real.sum(1).int() if "padding" in has else None,
    )
    damaged = x.clone()
    damaged[~real] = torch.nan
    x, grad_y = damaged, grad_y.masked_fill(~real[..., None], torch.nan)
    columns = inside_a_wider_array(x, 16, 8) if "wide" in has else x
    y = convolution.forward(launch, columns, kernel, **given, silu=activated, tile=tile)
    found = convolution.gradients(launch, grad_y, columns, kernel, **given, silu=activated, tile=tile)

    x, grad_y = (each.nan_to_num() for each in (x, grad_y))
    exact = [x, kernel, bias if "bias" in has else torch.zeros(e), initial if "initial" in has else 0 * initial]
    exact = [each.to(torch.float64).requires_grad_() for each in exact]
    reaches = begins if "documents" in has else torch.full((b, t), k - 1)
    # The reference runs over the real tokens of each row, in their order.
    index = order.long()[..., None].expand(-1, -1, e)
    of_real = reference(exact[0].gather(1, index), *exact[1:], reaches, activated)
    expected = torch.zeros(b, t, e, dtype=torch.float64).scatter(1, index, of_real) * real[..., None]
    grads = torch.autograd.grad((expected * grad_y).sum(), exact, allow_unused=True)
    rounded = dtype != torch.float32
    assert y.dtype == found[0].dtype == dtype and found[1].dtype == torch.float32
    close(y, expected.detach(), name + "y", rounded)
    close(found[0], grads[0], name + "gradient of x", rounded)
    close(found[1], grads[1], name + "gradient of the kernel")
    for i, part in ((2, "bias"), (3, "initial")):
        assert (found[i] is None) == (part not in has), name + part
        if part in has:
            assert found[i].dtype == (dtype if i == 3 else torch.float32)
            close(found[i], grads[i], name + "gradient of " + part, rounded and i == 3)
    if not has and not activated:
        for row in range(b):
            alone, _ = oracles.causal_depthwise_conv(x[row], kernel.numpy(), 0, np.zeros((k - 1, e)))
            close(y[row], alone, name + "one row")


def check_a_view():
    """Checks columns of a view with an explicit row stride: the kernel reads nothing outside the view."""
    rng = np.random.default_rng(0)
    x, kernel = normal(rng, 2, 9, 24), normal(rng, 4, 24)
    wide = inside_a_wider_array(x, 24, 0).array
    y = convolution.forward(launch, convolution.Columns(wide[..., 24:], row=48), kernel)
    close(y, convolution.forward(launch, x, kernel), "a view")


def check_scan_step(b, e, n, *, has=(), dtype=torch.float32, tile=None):
    name = f"scan step: b {b}, e {e}, n {n}, {has}, {dtype}, tile {tile}: "
    rng = np.random.default_rng(e)
    u, delta, z = (normal(rng, b, e, dtype=dtype) for _ in range(3))
    B, C = (normal(rng, b, n, dtype=dtype) for _ in range(2))
    A, state, D, bias = -torch.exp(normal(rng, e, n)), normal(rng, b, e, n), normal(rng, e), normal(rng, e)
    softplus = "softplus" in has
    delta = delta if softplus else delta.abs()
    wide = "wide" in has
    joined = torch.cat([torch.full((b, 8), torch.nan, dtype=dtype), B, C], -1)
    real = torch.tensor(np.arange(b) % 3 > 0).to(torch.int8) if "real" in has else None
    if real is not None:
        u[0] = torch.inf  # a padding token
    y, after = step.scan(
        GPU,
        inside_a_wider_array(u, 3, 2) if wide else u,
        delta,
        A,
        convolution.Columns(joined, 8) if wide else B,
        convolution.Columns(joined, 8 + n) if wide else C,
        D if "D" in has else None,
        (inside_a_wider_array(z, e, 0) if wide else z) if "z" in has else None,
        bias if "bias" in has else None,
        state=state,
        real=real,
        softplus=softplus,
        tile=tile,
    )
    assert y.dtype == dtype and after.dtype == torch.float32
    if real is not None:
        u[0] = 0
    exact = lambda x: x.to(torch.float64).numpy()  # noqa: E731
    token = lambda x: exact(x)[:, None]  # noqa: E731
    expected, last = oracles.selective_scan(
        token(u),
        token(delta),
        exact(A),
        token(B),
        token(C),
        exact(D) if "D" in has else None,
        token(z) if "z" in has else None,
        exact(bias) if "bias" in has else None,
        softplus,
        exact(state),
    )
    expected = expected[:, 0]
    if real is not None:
        is_real = real.numpy() > 0
        expected = np.where(is_real[:, None], expected, 0)
        last = np.where(is_real[:, None, None], last, exact(state))
    close(y, expected, name + "y", dtype != torch.float32)
    close(after, last, name + "state")


def check_op(masked, packed):
    """Checks `causal_depthwise_conv` with masks and documents against the portable implementation."""
    rng = np.random.default_rng(0)
    arrays = [normal(rng, *shape) for shape in ((2, 13, 6), (4, 6), (6,), (2, 3, 6))]
    mask = torch.tensor(np.arange(26).reshape(2, 13) % 4 != 2) if masked else None
    ids = torch.tensor(np.array([[0] * 5 + [1] * 8, [2] * 2 + [3] * 4 + [4] * 7])).int() if packed else None
    found = []
    for implementation in (triton, portable):
        leaves = [x.clone().requires_grad_() for x in arrays]
        wide = torch.cat([leaves[0], leaves[0].detach()], -1)[..., :6]
        y = implementation.run(wide, *leaves[1:], mask, ids, True)
        found.append([y, *torch.autograd.grad((y * y).sum(), leaves)])
    for actual, expected in zip(*found, strict=True):
        close(actual.detach(), expected.detach(), f"masked {masked} packed {packed}")


for masked in (False, True):
    for packed in (False, True):
        check_op(masked, packed)

ALL = ("bias", "initial", "documents", "wide")
for t in (1, 2, 7, 65):
    check_convolution(2, t, 24, 4, has=ALL, tile=TILE)
    check_convolution(1, t, 24, 4, has=ALL)
for k in (1, 2, 3, 5, 8):
    check_convolution(1, 34, 16, k, has=ALL, tile=TILE)
    check_convolution(1, 17, 3, k, has=("initial",), activated=False)
for dtype in (torch.bfloat16, torch.float16):
    check_convolution(2, 70, 40, 4, has=ALL, dtype=dtype)
    check_convolution(2, 3, 300, 3, has=("bias",), dtype=dtype)
for t in (1, 5, 70):
    check_convolution(3, t, 24, 4, has=("padding",), tile=TILE)
    check_convolution(2, t, 24, 4, has=(*ALL, "padding"), tile=TILE)
    check_convolution(2, t, 40, 3, has=(*ALL, "padding"), dtype=torch.bfloat16)
check_convolution(3, 20, 8, 4)
check_convolution(3, 20, 8, 4, activated=False)
check_a_view()

SCAN = ("D", "z", "bias", "softplus", "real", "wide")
for tile in (None, (1, 8, 1), (2, 16, 1), (4, 32, 4)):
    check_scan_step(4, 40, 16, has=SCAN, tile=tile)
    check_scan_step(4, 40, 16, has=SCAN, dtype=torch.bfloat16, tile=tile)
check_scan_step(3, 17, 5, has=SCAN)
check_scan_step(2, 8, 1, has=())
for left_out in SCAN:
    check_scan_step(2, 24, 16, has=tuple(each for each in SCAN if each != left_out))
print("all are equal")

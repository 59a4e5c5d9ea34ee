"""The kernels of SwiGLU in Triton's interpreter on a CPU, against float64.

Runs in its own process: KERAS_BACKEND=torch TRITON_INTERPRET=1 python tests/subprocess/interpreted_swiglu.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "helpers")]
import triton_on_cpu  # noqa: E402

from keras_jamba._backend.torch import _swiglu, _triton  # noqa: E402

_triton._launched = triton_on_cpu.launch


def exact(gate, up):
    return torch.nn.functional.silu(gate) * up


def close(actual, expected, dtype=torch.float32):
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert actual.dtype == dtype and actual.shape == expected.shape
    np.testing.assert_allclose(actual.detach().double(), expected.detach(), rtol=rtol, atol=rtol)


def check(shape, dtype=torch.float32, change=lambda x: x):
    rng = np.random.default_rng(0)
    gate, up, gradient = (change(torch.tensor(rng.standard_normal(shape)).to(dtype)) for _ in range(3))
    given = [x.detach().requires_grad_() for x in (gate, up)]
    found = _swiglu._in_kernels(*given)
    leaves = [x.detach().double().requires_grad_() for x in (gate, up)]
    expected = exact(*leaves)
    close(found, expected, dtype)
    actual = torch.autograd.grad(found, given, gradient)
    for mine, theirs in zip(actual, torch.autograd.grad(expected, leaves, gradient.double()), strict=True):
        close(mine, theirs, dtype)


check((3, 5, 40))
check((7, 2500))
check((4, 33), torch.bfloat16)
check((2, 4, 6), change=lambda x: x.transpose(0, 1))

gate, up = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
results = []
for function, given in (
    (_swiglu._in_kernels, [gate, up]),
    (exact, [x.detach().double().requires_grad_() for x in (gate, up)]),
):
    first = torch.autograd.grad(function(*given).sin().sum(), given, create_graph=True)
    results.append(torch.autograd.grad(sum(g.square().sum() for g in first), given))
for actual, expected in zip(*results, strict=True):
    close(actual, expected)

_triton.why_not_here = lambda: None
fits = _swiglu._fits_kernels
assert fits(gate, up) and fits(gate, up.detach())
assert not fits(gate.detach(), up.detach()) and not fits(gate, up.double()) and not fits(gate, up[:1])
with torch.no_grad():
    assert not fits(gate, up)
seen = []
torch.func.grad(lambda x: (seen.append(fits(x, up)), x.sum())[1])(gate.detach())
assert seen == [False]
print("all are equal")

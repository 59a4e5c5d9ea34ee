"""The kernels of RMSNorm in Triton's interpreter on a CPU, against float64.

Runs in its own process: KERAS_BACKEND=torch TRITON_INTERPRET=1 python tests/subprocess/interpreted_norm.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "helpers")]
import triton_on_cpu  # noqa: E402

from keras_jamba._backend.torch import _norm, _triton  # noqa: E402

# Outputs begin as NaN.
_triton._launched = triton_on_cpu.launch
EPSILON = 1e-3


def exact(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * scale


def close(actual, expected, name, dtype=torch.float32):
    assert actual.dtype == dtype and actual.shape == expected.shape, name
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    scale = float(expected.detach().abs().max())
    np.testing.assert_allclose(
        actual.detach().double().numpy(), expected.detach().numpy(), rtol=rtol, atol=rtol * scale, err_msg=name
    )


def check(shape, dtype=torch.float32, columns=None):
    """Checks outputs and gradients. `columns` makes x a slice of a wider array, with NaN around it."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: torch.tensor(rng.standard_normal(shape)).to(dtype)  # noqa: E731
    x, grad_y = normal(*shape), normal(*shape)
    scale = torch.tensor(rng.standard_normal(shape[-1]).astype("float32"), requires_grad=True)
    given = x
    if columns is not None:
        wider = torch.full((*shape[:-1], columns), torch.nan, dtype=dtype)
        wider[..., 2 : 2 + shape[-1]] = x
        given = wider[..., 2 : 2 + shape[-1]]
        assert not given.is_contiguous()
    given = given.detach().requires_grad_()
    y = _norm._RMSNorm.apply(given, scale, EPSILON)
    found = torch.autograd.grad(y, [given, scale], grad_y)
    leaves = [x.double().requires_grad_(), scale.detach().double().requires_grad_()]
    expected = exact(*leaves)
    close(y, expected, f"y of {shape}", dtype)
    wanted = torch.autograd.grad(expected, leaves, grad_y.double())
    close(found[0], wanted[0], f"gradient of x of {shape}", dtype)
    close(found[1], wanted[1], f"gradient of scale of {shape}")


def check_second_gradients():
    x = torch.randn(3, 5, dtype=torch.float32, requires_grad=True)
    scale = torch.randn(5, requires_grad=True)
    leaves = [v.detach().double().requires_grad_() for v in (x, scale)]
    results = []
    for function, given in ((lambda *v: _norm._RMSNorm.apply(*v, EPSILON), [x, scale]), (exact, leaves)):
        first = torch.autograd.grad(function(*given).sin().sum(), given, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), given))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, "second gradient")


def check_batched_gradients():
    x, scale = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    batch = torch.randn(4, 3, 5)
    y = _norm._RMSNorm.apply(x, scale, EPSILON)
    found = torch.autograd.grad(y, [x, scale], batch, is_grads_batched=True)
    leaves = [v.detach().double().requires_grad_() for v in (x, scale)]
    expected = torch.autograd.grad(exact(*leaves), leaves, batch.double(), is_grads_batched=True)
    for actual, wanted in zip(found, expected, strict=True):
        close(actual, wanted, "batched gradients")


def check_guards():
    """Checks that other calls use PyTorch's function."""
    many = lambda *shape, **given: torch.zeros(*shape, requires_grad=True, **given)  # noqa: E731
    scale, fits = torch.ones(40), _norm._fits_kernels
    assert fits(many(2, 1024, 40), scale) and fits(torch.zeros(2048, 40), scale.clone().requires_grad_())
    assert not fits(many(2047, 40), scale)
    assert fits(many(2048, 768), torch.ones(768)) and not fits(many(2048, 8193), torch.ones(8193))
    assert not fits(many(2048, 40, dtype=torch.float64), scale)
    assert not fits(torch.zeros(2048, 40), scale)
    with torch.no_grad():
        assert not fits(many(2048, 40), scale)
    # Without a GPU, `torch.autocast` does nothing.
    torch.set_autocast_enabled("cuda", True)
    assert not fits(many(2048, 40), scale)
    torch.set_autocast_enabled("cuda", False)
    with torch.autograd.forward_ad.dual_level():
        assert not fits(many(2048, 40), scale)
    seen = []
    torch.func.grad(lambda x: (seen.append(fits(x, scale)), x.sum())[1])(torch.zeros(2048, 40))
    torch.compile(lambda x: (seen.append(fits(x, scale)), x * 2)[1], backend="eager", fullgraph=False)(many(2048, 40))
    assert not any(seen)


def check_frozen(which):
    x, scale = torch.randn(3, 5, requires_grad=which != 0), torch.randn(5, requires_grad=which != 1)
    _norm._RMSNorm.apply(x, scale, EPSILON).sum().backward()
    assert (x.grad is None) == (which == 0) and (scale.grad is None) == (which == 1)


check((70, 40))
check((2, 300, 40))
check((2, 3, 4, 16))
check((3, 50, 3), columns=35)
check((1, 7, 3000))
strided = torch.arange(10.0)[::2]
x = torch.randn(3, 5)
close(_norm._RMSNorm.apply(x, strided, EPSILON), exact(x.double(), strided.double()), "a strided scale")
check((2, 65, 24), torch.bfloat16, columns=40)
check((130, 33), torch.float16)
# More tiles of rows than programs.
_triton._device = lambda: (1, "", True, None)
check((700, 40))
check_second_gradients()
check_batched_gradients()
_triton.why_not_here = lambda: None
check_guards()
assert _triton.kernels_run(torch.device("cpu"))
_triton.kernels_run.cache_clear()
_triton._launched = None
assert not _triton.kernels_run(torch.device("cpu"))
_triton._launched = triton_on_cpu.launch
check_frozen(0)
check_frozen(1)
print("all are equal")

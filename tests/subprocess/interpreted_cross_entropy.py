"""The kernels of cross-entropy in Triton's interpreter on a CPU, against float64.

Runs in its own process: KERAS_BACKEND=torch TRITON_INTERPRET=1 python tests/subprocess/interpreted_cross_entropy.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "helpers")]
import triton_on_cpu  # noqa: E402

from keras_jamba._backend.torch import _cross_entropy, _triton  # noqa: E402

_triton._launched = triton_on_cpu.launch
_cross_entropy._uses_kernels = lambda logits: True


def check(rows, classes, change=lambda logits: None, dtype="float32"):
    rng = np.random.default_rng(0)
    logits = torch.tensor(3 * rng.standard_normal((rows, classes)).astype("float32"))
    change(logits)
    targets = torch.tensor(rng.integers(0, classes, rows))
    factors = torch.tensor(rng.random(rows).astype("float32"))
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (losses * factors.double()).sum().backward()
    logs, found, predicted = _cross_entropy.cross_entropy_of_rows(logits, targets)
    assert logs.dtype == found.dtype == torch.float32 and predicted.dtype == torch.int32
    name = f"{rows} x {classes}"
    np.testing.assert_allclose(logs, exact.detach().logsumexp(1), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(found, losses.detach(), rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(predicted, logits.argmax(1), err_msg=name)
    grads = _cross_entropy.cross_entropy_gradient(logits, logs, targets, factors, dtype)
    assert grads.dtype == getattr(torch, dtype)
    rtol = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(grads.float(), exact.grad, rtol=rtol, atol=1e-6, err_msg=name)


def with_impossible_classes(logits):
    logits[:, ::3] = -torch.inf
    logits[1, :4096] = -torch.inf
    logits[2, 5000:] = -torch.inf


def with_large_numbers(logits):
    logits[:, 4200] = 1e4
    logits += 1e4


def with_equal_logits(logits):
    logits[:] = 0


check(5, 50)
check(3, 1)
check(4, 9000)
check(4, 9000, with_large_numbers)
check(3, 5000, with_equal_logits)
check(3, 300, dtype="bfloat16")

logits = torch.randn(3, 9000)
with_impossible_classes(logits)
targets = torch.tensor([1, 4099, 4])
logs, losses, predicted = _cross_entropy.cross_entropy_of_rows(logits, targets)
np.testing.assert_allclose(logs, logits.double().logsumexp(1), rtol=1e-6)
np.testing.assert_array_equal(predicted, logits.argmax(1))
assert torch.isfinite(_cross_entropy.cross_entropy_gradient(logits, logs, targets, torch.ones(3), "float32")).all()
# A damaged row has no finite loss, and changes no other row.
for value in (torch.nan, torch.inf):
    logits = torch.zeros(2, 9000)
    logits[0, 7000] = value
    losses = _cross_entropy.cross_entropy_of_rows(logits, torch.tensor([3, 3]))[1]
    assert not torch.isfinite(losses[0]) and torch.isclose(losses[1], torch.tensor(9000.0).log())
print("all are equal")

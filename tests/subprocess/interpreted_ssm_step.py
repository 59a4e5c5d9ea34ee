"""One token of the selective state space in Triton's interpreter on a CPU, against float64.

Runs in its own process: KERAS_BACKEND=torch TRITON_INTERPRET=1 python tests/subprocess/interpreted_ssm_step.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "helpers")]
import triton_on_cpu  # noqa: E402

from keras_jamba._backend.torch import _triton  # noqa: E402
from keras_jamba._triton import ssm_step  # noqa: E402

EPSILON = 1e-3
GPU = _triton._gpu(triton_on_cpu.launch)


def silu(x):
    return x * torch.sigmoid(x)


def normed(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * scale.double()


def exact(x, z, conv, state, weights):
    """Returns `(y, next conv, next state)` in float64."""
    window = torch.cat([conv, x[:, None]], dim=1).double()
    u = (window * weights.kernel.double()).sum(1) + (0 if weights.bias is None else weights.bias.double())
    u = silu(u)
    widths = [scale.shape[0] for scale in weights.scales]
    parts = (u @ weights.x_matrix.double()).split(widths, dim=1)
    low, B, C = (normed(part, scale) for part, scale in zip(parts, weights.scales, strict=True))
    delta = torch.nn.functional.softplus(low @ weights.dt_matrix.double() + weights.dt_bias.double())
    after = torch.exp(delta[..., None] * weights.A.double()) * state.double() + (delta * u)[..., None] * B[:, None]
    y = ((after * C[:, None]).sum(-1) + weights.D.double() * u) * silu(z.double())
    return y, window[:, 1:], after


def check(e, width, rank, states, with_bias):
    rng = np.random.default_rng(e)
    normal = lambda *shape, dtype=torch.float16: torch.tensor(rng.standard_normal(shape)).to(dtype)  # noqa: E731
    weights = ssm_step.Weights(
        kernel=normal(width, e),
        bias=normal(e) if with_bias else None,
        x_matrix=normal(e, rank + 2 * states) / e**0.5,
        scales=tuple(normal(n) for n in (rank, states, states)),
        dt_matrix=normal(rank, e) / rank**0.5,
        A=-torch.exp(normal(e, states, dtype=torch.float32)),
        D=normal(e, dtype=torch.float32),
        dt_bias=normal(e, dtype=torch.float32),
    )
    x, z, conv, state = normal(1, e), normal(1, e), normal(1, width - 1, e), normal(1, e, states, dtype=torch.float32)
    expected = exact(x, z, conv, state, weights)
    given = GPU, x, z, conv, state, weights, EPSILON
    for name, found, wanted in zip(("y", "conv", "state"), ssm_step.step(*given), expected, strict=True):
        tolerance = 0 if name == "conv" else 1e-2 * float(wanted.abs().max())
        np.testing.assert_allclose(found.double().numpy(), wanted.numpy(), rtol=0, atol=tolerance, err_msg=name)

    # In place.
    found = ssm_step.step(*given, into={1: conv, 2: state})
    assert found[1] is conv and found[2] is state
    np.testing.assert_array_equal(conv.double().numpy(), expected[1].numpy())
    np.testing.assert_allclose(state.numpy(), expected[2].numpy(), rtol=0, atol=1e-2 * float(expected[2].abs().max()))


for given in ((40, 4, 5, 8, True), (600, 2, 16, 16, False), (70, 3, 33, 3, True), (2100, 4, 8, 4, False)):
    check(*given)

print("all are equal")

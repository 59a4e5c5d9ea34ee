"""Kernels for few tokens without a gradient, on PyTorch: Triton on a GPU."""

import torch

from keras_jamba._backend.torch import _triton
from keras_jamba._backend.torch._c_kernels import row_step
from keras_jamba._backend.torch._owned_state import is_owned
from keras_jamba._triton import few_rows as kernels
from keras_jamba._triton import ssm_step as one
from keras_jamba._triton import step
from keras_jamba._triton.convolution import Columns
from keras_jamba._triton.scan import MOST_STATES

_SHORT = (torch.bfloat16, torch.float16)
# The library divides the sums of a narrow matrix among programs.
_FEWEST_COLUMNS, _MOST_TERMS = 512, 2048


def applies(x):
    return x.is_cuda and not torch.is_grad_enabled()


def product(x, matrix, divisor=None):
    if not _fits(x, matrix, divisor):
        return None
    if divisor is None and matrix.shape[1] < _FEWEST_COLUMNS and matrix.shape[0] > _MOST_TERMS:
        return None
    found = kernels.product(_triton._gpu(), *_with_step(_rows(x)), matrix, divisor=divisor)
    return found.reshape(*x.shape[:-1], matrix.shape[1])


def gated_product(x, gate, up, gate_divisor=None, up_divisor=None):
    if not _fits(x, gate, gate_divisor) or not _fits(x, up, up_divisor):
        return None
    if (gate_divisor is None) != (up_divisor is None) or gate.shape != up.shape:
        return None
    given = dict(gate=gate, divisor=up_divisor, gate_divisor=gate_divisor)
    return kernels.product(_triton._gpu(), *_with_step(_rows(x)), up, **given).reshape(*x.shape[:-1], up.shape[1])


def added_norm(x, other, scale, epsilon):
    if not _runs(x) or x.shape != other.shape or x.dtype != other.dtype or x.shape[-1] > kernels.WIDEST:
        return None
    given = _triton._gpu(), _rows(x).contiguous(), scale.contiguous(), epsilon, _rows(other).contiguous()
    return tuple(y.reshape(x.shape) for y in kernels.added_norm(*given))


def norm(x, scale, epsilon):
    if not _runs(x) or x.shape[-1] > kernels.WIDEST:
        return None
    found = kernels.added_norm(_triton._gpu(), _rows(x).contiguous(), scale.contiguous(), epsilon)
    return found[1].reshape(x.shape)


def norms_of_slices(x, scales, epsilon):
    if not _runs(x) or x.shape[-1] > kernels.WIDEST or len(scales) != 3:
        return None
    found = kernels.norms_of_slices(_triton._gpu(), *_with_step(_rows(x)), [s.contiguous() for s in scales], epsilon)
    return found.reshape(x.shape)


def convolution_step(x, kernel, bias, state, silu):
    if not _runs(x) or x.shape[1] != 1 or state.dtype != x.dtype or kernel.shape[0] < 2:
        return None
    given = (part if part is None else part.contiguous() for part in (kernel, bias, state))
    y, after = kernels.convolution_step(_triton._gpu(), *_with_step(_rows(x)), *given, silu, _into({1: state}))
    return y[:, None], after


def scan_step(u, delta, A, B, C, D, z, bias, softplus, state):
    if not _runs(u) or u.shape[1] != 1 or A.shape[1] > MOST_STATES:
        return None
    of = lambda x: None if x is None else Columns(*_columns(x))  # noqa: E731
    weights = [x if x is None else x.float().contiguous() for x in (A, D, bias)]
    given = dict(state=state.float().contiguous(), softplus=softplus, into=_into({1: state}))
    A, D, bias = weights
    y, after = step.scan(_triton._gpu(), of(u), of(delta), A, of(B), of(C), D, of(z), bias, **given)
    return y[:, None], after


def ssm_step(x, z, conv, state, weights, epsilon):
    if not _runs(x) or x.shape[:2] != (1, 1) or x.dtype not in _SHORT:
        return None
    rank, width = weights["dt_matrix"].shape[0], weights["kernel"].shape[0]
    matrices = weights["x_matrix"], weights["dt_matrix"]
    if rank > one.WIDEST_RANK or width < 2 or any(matrix.dtype != x.dtype for matrix in (*matrices, conv)):
        return None
    arrays = {name: x.contiguous() if isinstance(x, torch.Tensor) else x for name, x in weights.items()}
    given = (part.contiguous() for part in (_rows(x), _rows(z), conv, state))
    y, *after = one.step(_triton._gpu(), *given, one.Weights(**arrays), epsilon, _into({1: conv, 2: state}))
    return y[:, None], *after


def _into(states):
    """Returns those of the states `{output: tensor}` that the kernel may overwrite."""
    return {i: x for i, x in states.items() if is_owned(x) and x.is_contiguous()}


def _columns(x):
    rows, step = _with_step(_rows(x))
    return rows, 0, step


def _fits(x, matrix, divisor):
    """Returns whether the kernel can multiply x by the matrix, which is int8 if it has a divisor."""
    dtype = x.dtype if divisor is None else torch.int8
    few = _runs(x) and x.numel() <= kernels.MOST_ROWS * x.shape[-1]
    return few and x.dtype in _SHORT and matrix.dtype is dtype and matrix.is_contiguous()


def _runs(x):
    """Returns whether x is on a GPU with Triton, needs no gradient, and is neither traced nor transformed."""
    return (
        x.is_cuda
        and not torch.is_grad_enabled()
        and x.dtype in (torch.float32, *_SHORT)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cuda")
        and _triton.can_differentiate()
        and _triton.kernels_run(x.device)
    )


def _rows(x):
    """Returns `x (..., d)` as `(rows, d)`."""
    return x.reshape(-1, x.shape[-1])


def _with_step(rows):
    """Returns rows that the kernels can read, and their stride."""
    step = row_step(rows[:, None])
    return (rows, step) if step is not None else (rows.contiguous(), rows.shape[1])

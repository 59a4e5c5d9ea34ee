"""Products of rows sorted by group on PyTorch, and how a kernel in Triton is launched there."""

import contextlib
import functools
import importlib.util

import torch
from torch.nn import functional

from keras_jamba._backend.recording_on_torch import recording


def grouped_product(x, bank, counts, turned=False):
    return functional.grouped_mm(x, bank.mT if turned else bank, offs=_ends(counts))


def grouped_sum(a, b, counts):
    return functional.grouped_mm(a.mT, b, offs=_ends(counts))


def why_not_grouped(platform, dtype, sizes):
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    if any(each * size % 16 for each in sizes):
        return f"PyTorch wants rows of a multiple of 16 bytes, and these have {' and '.join(map(str, sizes))} {dtype}"
    if platform == "gpu" and (dtype != "bfloat16" or torch.cuda.get_device_capability()[0] not in (9, 10)):
        return "but for bfloat16 on a GPU of capability 9 or 10 PyTorch waits for the counts, as 'split' does"
    return None


def _ends(counts):
    return counts.cumsum(0, dtype=torch.int32)


@functools.cache
def _why_not_here():
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() or torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return "Triton's kernels are for an NVIDIA GPU of capability 8.0 or more"
    return None


def why_not_triton():
    if _why_not_here():
        return _why_not_here()
    if recording() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "what is written down or compiled has no place for such a kernel"
    # Where an operator has no rule for it, PyTorch takes the derivative for zero.
    if torch.autograd.forward_ad._current_level >= 0:
        return "it has no forward-mode derivatives"
    return None


def launch(kernel, grid, inputs, outputs, constants, num_warps=4, num_stages=3):
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError(
            "A kernel in Triton has no gradient of its own. Received: tensors that ask for one, as in a gradient of a "
            "gradient. Compute it with another implementation of the op."
        )
    device = inputs[0].device
    inputs = [x.contiguous() for x in inputs]
    made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in outputs]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*inputs, *made, **constants, num_warps=num_warps, num_stages=num_stages)
    return made

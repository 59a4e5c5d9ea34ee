"""SwiGLU on PyTorch: Triton kernels, which read and write each tensor once, and PyTorch's functions."""

import torch
from torch.nn import functional

from keras_jamba._backend.torch import _triton
from keras_jamba._triton import grouped

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def swiglu(gate, up):
    if gate.is_cuda and _fits_kernels(gate, up) and _triton.kernels_run(gate.device):
        return _in_kernels(gate, up)
    return functional.silu(gate) * up


def _in_kernels(gate, up):
    # Not a view inside the function, whose outputs PyTorch would not let a caller overwrite.
    return _SwiGLU.apply(gate, up).reshape(up.shape)


def _fits_kernels(gate, up):
    """Returns whether there are tensors of one kind, with elements and a gradient, neither traced nor transformed."""
    return (
        type(gate) is type(up) is torch.Tensor
        and gate.dtype == up.dtype
        and gate.dtype in _DTYPES
        and gate.shape == up.shape
        and gate.numel() > 0
        and torch.is_grad_enabled()
        and (gate.requires_grad or up.requires_grad)
        and _triton.can_differentiate()
    )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return grouped.activation(_triton._gpu(), _rows(up), _rows(gate))

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        # A gradient of this gradient may follow; and a batch of gradients has no storage.
        if torch.is_grad_enabled() or _triton.is_batched(gradient):
            gradient, slope = gradient.reshape(gate.shape), gate.sigmoid()
            return gradient * up * slope * (1 + gate * (1 - slope)), gradient * gate * slope
        grad_up, grad_gate, *_ = grouped.activation_gradient(_triton._gpu(), *map(_rows, (gradient, up, gate)))
        return grad_gate.view(gate.shape), grad_up.view(up.shape)


def _rows(x):
    return x.reshape(-1, x.shape[-1]).contiguous()

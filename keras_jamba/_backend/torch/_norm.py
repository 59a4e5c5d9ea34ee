"""RMSNorm on PyTorch: Triton kernels for many rows, and PyTorch's own function.

PyTorch 2.11 sums the gradient of the scale with one program per 32 channels, which leaves most of a GPU idle.
"""

import torch
from torch.nn import functional

from keras_jamba._backend.torch import _triton, decoding
from keras_jamba._backend.torch._c_kernels import row_step
from keras_jamba._triton import norm

_LEAST_ROWS, _WIDEST = 2048, 8192
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x, scale, epsilon):
    if x.is_cuda and _fits_kernels(x, scale) and _triton.kernels_run(x.device):
        return _RMSNorm.apply(x, scale, epsilon)
    if x.is_cuda and x.numel() < _LEAST_ROWS * x.shape[-1]:
        found = decoding.norm(x, scale, epsilon)
        if found is not None:
            return found
    return _library_norm(x, scale, epsilon)


def _library_norm(x, scale, epsilon):
    # Keras' own copies x to float32 and casts back. PyTorch's function computes in float32 without the copy.
    return functional.rms_norm(x, x.shape[-1:], scale.to(x.dtype), epsilon)


def _fits_kernels(x, scale):
    """Returns whether a norm has many rows, has a gradient, and is neither traced nor transformed."""
    return (
        type(x) is torch.Tensor
        and torch.is_grad_enabled()
        and (x.requires_grad or scale.requires_grad)
        and x.dtype in _DTYPES
        and x.shape[-1] <= _WIDEST
        and x.numel() >= _LEAST_ROWS * x.shape[-1]
        # PyTorch's function returns float32 there.
        and not torch.is_autocast_enabled("cuda")
        and _triton.can_differentiate()
    )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, epsilon):
        y, inverse = norm.forward(_triton._gpu(), *_readable(x, scale), epsilon)
        ctx.save_for_backward(x, scale, inverse)
        ctx.epsilon = epsilon
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, scale, inverse = ctx.saved_tensors
        # A gradient of this gradient may follow; and a batch of gradients has no storage.
        if torch.is_grad_enabled() or _triton.is_batched(grad_y):
            return *_library_gradients(x, scale, ctx.epsilon, grad_y), None
        given = grad_y.contiguous(), *_readable(x, scale), inverse
        grad_x, grad_scale = norm.gradients(_triton._gpu(), *given)
        return grad_x, grad_scale.to(scale.dtype), None


def _library_gradients(x, scale, epsilon, grad_y):
    """Returns the gradients of x and scale, None for one that needs none, by PyTorch's function."""
    again = torch.is_grad_enabled()
    given = [each if again else each.detach().requires_grad_(each.requires_grad) for each in (x, scale)]
    with torch.enable_grad():
        y = _library_norm(*given, epsilon)
    wanted = [each for each in given if each.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=again))
    return [next(found) if each.requires_grad else None for each in given]


def _readable(x, scale):
    """Returns `(x, row, scale)` as the kernels read them; row is the row stride of x."""
    row = row_step(x) if x.dim() == 3 else None
    return (x.contiguous() if row is None else x), (x.shape[-1] if row is None else row), scale.contiguous()

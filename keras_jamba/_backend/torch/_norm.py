"""RMSNorm on PyTorch: Triton kernels for many narrow rows, and PyTorch's own function.

PyTorch 2.11 sums the gradient of the scale with one program per 32 channels, which leaves most of a GPU idle for narrow
rows: 20 us of an H200 for 8,192 rows of 40 channels.
"""

import torch
from torch.nn import functional

from keras_jamba._backend.torch import _triton
from keras_jamba._backend.torch._c_kernels import row_step
from keras_jamba._triton import norm

_LEAST_ROWS, _WIDEST = 2048, 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x, scale, epsilon):
    if _are_narrow(x, scale):
        return _RMSNorm.apply(x, scale, epsilon)
    # Keras' own copies x to float32 and casts back. PyTorch's function computes in float32 without the copy.
    return functional.rms_norm(x, x.shape[-1:], scale.to(x.dtype), epsilon)


def _are_narrow(x, scale):
    return (
        x.is_cuda
        and type(x) is torch.Tensor
        and torch.is_grad_enabled()
        and (x.requires_grad or scale.requires_grad)
        and x.dtype in _DTYPES
        and x.shape[-1] <= _WIDEST
        and x.numel() >= _LEAST_ROWS * x.shape[-1]
        and _triton.why_not_triton() is None
        # Function transforms need rules that the class below has not.
        and torch._C._functorch.peek_interpreter_stack() is None
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
        if torch.is_grad_enabled():
            # A gradient of this gradient may follow.
            y = functional.rms_norm(x, x.shape[-1:], scale.to(x.dtype), ctx.epsilon)
            wanted = [each for each in (x, scale) if each.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
            return *(next(found) if each.requires_grad else None for each in (x, scale)), None
        given = grad_y.contiguous(), *_readable(x, scale), inverse
        grad_x, grad_scale = norm.gradients(_triton._gpu(), *given)
        return grad_x, grad_scale.to(scale.dtype), None


def _readable(x, scale):
    """Returns `(x, row, scale)` as the kernels read them; row is the row stride of x."""
    row = row_step(x) if x.dim() == 3 else None
    return (x.contiguous(), x.shape[-1], scale) if row is None else (x, row, scale)

"""Kernels of the C library and Triton kernels, on PyTorch."""

import torch

from keras_jamba._backend.torch import _c_kernels, _triton, autodiff
from keras_jamba._backend.torch._fx_tracing import is_tracing


def c_kernel_op(kernel, portable):
    return _c_kernels.differentiable(kernel, portable, _c_kernels.Operator)


def why_no_c_kernel(shape):
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "an exported graph must run without the C library"
    if is_tracing() and len(shape) == 3 and shape[1] == 1:
        return "a traced decoding step of one token uses PyTorch's own operations"
    # Without a rule, PyTorch would return a zero forward-mode derivative.
    if torch.autograd.forward_ad._current_level >= 0:
        return "it has no forward-mode derivatives"
    if autodiff.is_transformed():
        return "it does not support torch.func"
    return None


def triton_op(program, portable):
    return _c_kernels.differentiable(program, portable, _triton.LaunchedOperator)


def why_no_triton_op(shape):
    return _triton.why_not_here() or why_no_c_kernel(shape)


def triton_launcher():
    return _triton.launcher()


def why_no_triton():
    return _triton.why_not_triton()

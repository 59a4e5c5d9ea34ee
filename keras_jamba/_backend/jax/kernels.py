"""Kernels of the C library and Triton kernels, on JAX."""

from keras_jamba._backend.common.exporting_state import exports_for_other_runtime
from keras_jamba._backend.jax import _c_kernels, _triton

_c_kernels.register()


def c_kernel_op(kernel, portable):
    return _c_kernels.differentiable(kernel, portable, _c_kernels.lowered_on_cpu)


def why_no_c_kernel(shape):
    # For other devices and exports, the lowering selects the portable form.
    return None if all(isinstance(size, int) for size in shape) else "it needs sizes that are known"


def triton_op(program, portable):
    return _c_kernels.differentiable(program, portable, _triton.lowered_on_gpu)


def why_no_triton_op(shape):
    return _triton.why_not_here() or why_no_c_kernel(shape)


def triton_launcher():
    return _triton.launcher()


def why_no_triton():
    return "exported graphs have no kernels" if exports_for_other_runtime() else _triton.why_not_here()

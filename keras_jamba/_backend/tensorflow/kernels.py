"""Kernels of the C library, on TensorFlow. Triton kernels are unavailable."""

import tensorflow as tf

from keras_jamba._backend.common.unavailable import refuse
from keras_jamba._backend.tensorflow import _c_kernels
from keras_jamba._backend.tensorflow.tensors import needs_static_shapes

_NO_TRITON = "Triton kernels run on JAX and PyTorch only"


def c_kernel_op(kernel, portable):
    return _c_kernels.differentiable(kernel, portable)


def why_no_c_kernel(shape):
    if needs_static_shapes():
        return "XLA compiles this graph and cannot call the C library"
    if not tf.executing_eagerly() and _c_kernels.is_being_exported():
        return "an exported graph must run without the C library"
    return None


def triton_op(program, portable):
    return lambda tensors, options: refuse("triton_op", _NO_TRITON, "why_no_triton_op(shape)")


def why_no_triton_op(shape):
    return _NO_TRITON


def triton_launcher():
    refuse("triton_launcher", _NO_TRITON, "why_no_triton()")


def why_no_triton():
    return _NO_TRITON

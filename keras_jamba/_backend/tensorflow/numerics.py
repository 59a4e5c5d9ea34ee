"""Matrix products and norms, on TensorFlow."""

import tensorflow as tf

from keras_jamba._backend.common.numerics import (  # noqa: F401
    cross_entropy_gradient,
    cross_entropy_of_rows,
    has_fused_attention,
    masked_attention,
    matmul,
    plus_matmul,
    rms_norm,
    swiglu,
    unmasked_attention,
)
from keras_jamba._backend.common.unavailable import refuse

_NO_GROUPED_MATMUL = "TensorFlow has no grouped matrix product"


def matmul_in_float32(x, y):
    return tf.cast(tf.matmul(x, y), "float32")


def add_matmul(total, x, y):
    return total + matmul_in_float32(x, y)


def grouped_matmul(x, bank, counts, transpose_rhs=False):
    refuse("grouped_matmul", _NO_GROUPED_MATMUL, "why_no_grouped_matmul(...)")


def grouped_matmul_weight_grad(a, b, counts):
    refuse("grouped_matmul_weight_grad", _NO_GROUPED_MATMUL, "why_no_grouped_matmul(...)")


def why_no_grouped_matmul(platform, dtype, sizes):
    return _NO_GROUPED_MATMUL


def prefers_grouped_matmul():
    return False

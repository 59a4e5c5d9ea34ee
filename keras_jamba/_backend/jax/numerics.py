"""Matrix products and norms, on JAX."""

import jax

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


def matmul_in_float32(x, y):
    return jax.numpy.matmul(x, y, preferred_element_type="float32")


def add_matmul(total, x, y):
    return total + matmul_in_float32(x, y)


def grouped_matmul(x, bank, counts, transpose_rhs=False):
    contracted = ((1,), (2 if transpose_rhs else 1,))
    return _ragged(x, bank, counts, contracted, group_dimensions=[0])


def grouped_matmul_weight_grad(a, b, counts):
    return _ragged(a, b, counts, ((0,), (0,)), group_dimensions=[])


def _ragged(a, b, counts, contracted, group_dimensions):
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group_dimensions,
    )
    return jax.lax.ragged_dot_general(a, b, counts, numbers)


def why_no_grouped_matmul(platform, dtype, sizes):
    return None


def prefers_grouped_matmul():
    return False

"""Products of rows sorted by group on JAX."""

import jax


def grouped_product(x, bank, counts, turned=False):
    contracted = ((1,), (2 if turned else 1,))
    return _ragged(x, bank, counts, contracted, group_dimensions=[0])


def grouped_sum(a, b, counts):
    return _ragged(a, b, counts, ((0,), (0,)), group_dimensions=[])


def _ragged(a, b, counts, contracted, group_dimensions):
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group_dimensions,
    )
    return jax.lax.ragged_dot_general(a, b, counts, numbers)


def why_not_grouped(platform, dtype, sizes):
    return None

"""Products of rows sorted by group on JAX, and how a kernel in Triton is launched there."""

import functools
import importlib.util

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


@functools.cache
def why_not_triton():
    if any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")):
        return "Triton and jax-triton are not both installed"
    if jax.default_backend() != "gpu" or float(getattr(jax.devices()[0], "compute_capability", 0)) < 8:
        return "Triton's kernels are for an NVIDIA GPU of capability 8.0 or more"
    return None


def launch(kernel, grid, inputs, outputs, constants, num_warps=4, num_stages=3):
    # Only here: where there is no GPU it cannot be imported.
    import jax_triton

    specs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs]
    return jax_triton.triton_call(
        *inputs, kernel=kernel, out_shape=specs, grid=grid, num_warps=num_warps, num_stages=num_stages, **constants
    )

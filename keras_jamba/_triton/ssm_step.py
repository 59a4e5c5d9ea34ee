"""Launches of one token of the selective state space. They have no gradient."""

from typing import NamedTuple

from keras_jamba._triton.few_rows import run
from keras_jamba._triton.tuning import power

# The widest rank of delta whose matrix columns a program holds, and its channels.
WIDEST_RANK, _CHANNELS = 256, 32
# Terms per step and steps per program of the projection, and its columns.
_TERMS, _STEPS, _COLUMNS = 256, 2, 16


class Weights(NamedTuple):
    """Weights of a `SelectiveSSM`: `kernel (w, e)`, `x_matrix (e, r + 2 n)`, `dt_matrix (r, e)`, `A (e, n)`.

    `bias`, `D` and `dt_bias` are `(e,)`; bias may be None. `scales` are those of the norms of delta, B and C.
    """

    kernel: object
    bias: object
    x_matrix: object
    scales: tuple
    dt_matrix: object
    A: object
    D: object
    dt_bias: object


def step(gpu, x, z, conv, state, weights, epsilon, into=None):
    """Computes one token of one row.

    Args:
        gpu: a `Gpu`.
        x, z: `(1, e)`, contiguous.
        conv: `(1, w - 1, e)` in the dtype of x, w of at least 2.
        state: `(1, e, n)` float32.
        weights: the `Weights`, contiguous. The rank is at most WIDEST_RANK.
        epsilon: number added to the mean squares in the norms.
        into: `{1: array, 2: array}`, arrays for the next `conv` and `state`, which may be those of this step; or None.

    Returns:
        `(y (1, e), next conv, next state)`.
    """
    (_, e), (width, _), (rank, _) = x.shape, weights.kernel.shape, weights.dt_matrix.shape
    n, states = weights.x_matrix.shape[1], state.shape[2]
    has_bias, bias = weights.bias is not None, weights.kernel if weights.bias is None else weights.bias
    same, count = dict(E=e, W=width, HAS_BIAS=has_bias), -(-e // (_TERMS * _STEPS))
    constants = same | dict(N=n, STEPS=_STEPS, BK=_TERMS, BN=_COLUMNS)
    inputs = (x, weights.kernel, bias, conv, weights.x_matrix)
    grid, outputs = (-(-n // _COLUMNS), count), [((count, n), "float32")]
    (parts,) = run(gpu, _kernels().convolved_product, grid, inputs, outputs, constants, 4, (weights.x_matrix,))
    constants = same | dict(RANK=rank, STATES=states, COUNT=count, EPSILON=epsilon)
    constants |= dict(BLOCK=_CHANNELS, BR=power(rank), BS=power(states))
    last = weights.dt_matrix, weights.A, weights.D, weights.dt_bias
    inputs = (x, z, weights.kernel, bias, conv, parts, *weights.scales, *last, state)
    outputs = [(x.shape, x.dtype), (conv.shape, conv.dtype), (state.shape, state.dtype)]
    grid = (-(-e // _CHANNELS),)
    return run(
        gpu, _kernels().convolved_scan, grid, inputs, outputs, constants, 4, (*last, *weights.scales, bias), into
    )


def _kernels():
    # Imported lazily: Triton may be missing.
    from keras_jamba._triton import ssm_step_kernels

    return ssm_step_kernels

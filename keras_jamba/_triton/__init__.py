"""Triton kernels for a GPU, and their launches, independent of the backend: `_backend` owns arrays and launches.

Modules with `kernels` in their names import Triton. Launches import them lazily.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from keras_jamba._signature import Signature


class Gpu(NamedTuple):
    """Device and operations that a backend provides for launches.

    Attributes:
        launch: `(kernel, grid, inputs, outputs, constants, num_warps=, num_stages=, registers=, zeroed=, overlaps=,
            into=)`. Returns arrays of the `(shape, dtype)` in `outputs`. The kernel takes inputs, outputs, then the
            constants by name. The outputs whose indices are in `zeroed` start as zeros. `into` maps indices of outputs
            to arrays that replace new ones. `registers` limits the registers per thread (on JAX the limit is that of
            the `Program`). A kernel that `overlaps` starts while the last one still runs.
        row: maps an array `(b, t, e)` to its stride from one token to the next, in elements.
        cast: `(array, dtype)`, with another array's dtype or "float32". Returns the array in that dtype.
        multiprocessors: the number of multiprocessors of the device.
        device: the name of the device.
        has_rules: whether the rules for plans were measured on this kind of device.
        clock: None, or `(specs, run)`, which returns the seconds of `run(arrays)`: infinity if it fails, None if
            measuring is impossible now. `specs` are as in `tuning.chosen`.
        overlaps: maps arrays to whether a kernel can start, and read these, while the last one still runs.
    """

    launch: Callable
    row: Callable
    cast: Callable
    multiprocessors: int
    device: str = ""
    has_rules: bool = True
    clock: Callable | None = None
    overlaps: Callable = lambda arrays: False


@dataclass(frozen=True)
class Program(Signature):
    """Function that one or several kernels compute, with its gradient.

    Attributes:
        forward: `(gpu, tensors, options, train)`, with tensors and options by name. Returns the outputs, None for an
            omitted one.
        backward: `(gpu, tensors, options)`, or None if the portable form gives the gradient. Returns the gradients in
            the order of the inputs, None for an input that is None. The tensors are the inputs, the residuals, and the
            gradients of the other outputs as `grad_` and the output's name.
        strided: names of inputs `(b, t, e)` that may be slices of wider arrays.
        registers: the most registers per thread of the kernels of `forward` and of `backward`, or None for no limit.
    """

    forward: Callable
    backward: Callable | None
    strided: tuple
    registers: tuple | None

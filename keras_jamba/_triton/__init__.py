"""Kernels for a GPU, in Triton, and how each is launched. Knows no backend: `_backend` gives arrays and launches.

Modules with `kernels` in their names import Triton, and are imported where something is launched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from keras_jamba._signature import Signature


class Gpu(NamedTuple):
    """How whoever owns the arrays launches a kernel.

    Attributes:
        launch: `(kernel, grid, inputs, outputs, constants, num_warps=, num_stages=, registers=, zeroed=)`. Returns
            arrays of the `(shape, dtype)` in `outputs`; those whose places are in `zeroed` are zeros before. The kernel
            takes inputs, outputs, then the constants by name; a thread may use `registers` at most (on JAX those of
            its program).
        row: an array `(b, t, e)` to the elements from one token to the next.
        cast: an array and a dtype, another array's or "float32", to the array in it.
        multiprocessors: how many the device has.
        device: its name.
        has_rules: whether the rules for plans were measured on such a device.
        clock: None, or `(specs, run)` to the seconds that `run(arrays)` takes, infinite if it fails, None if nothing
            can be measured just now; `specs` as in `tuning.chosen`.
    """

    launch: Callable
    row: Callable
    cast: Callable
    multiprocessors: int
    device: str = ""
    has_rules: bool = True
    clock: Callable | None = None


@dataclass(frozen=True)
class Program(Signature):
    """A function that one or several kernels compute, and the one for its gradient.

    Attributes:
        forward: `(gpu, tensors, options, train)`, both by name, to the outputs, None for one that is left out.
        backward: `(gpu, tensors, options)` to the gradients in their order, None for that of an input that is None;
            tensors are the inputs, the hidden outputs, and `grad_` and the name of the others.
        strided: names of inputs `(b, t, e)` that may be parts of wider arrays.
        registers: how many a thread of its kernels may use, or None for as many as it likes.
    """

    forward: Callable
    backward: Callable
    strided: tuple
    registers: int | None

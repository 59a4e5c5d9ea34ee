"""The C library: its path, its kernels on arrays in memory, and the reason if it cannot be used.

This module handles addresses, shapes and dtypes, and is independent of the backend. The caller owns the memory and
keeps it alive during a call. `_backend.kernels.c_kernel_op` turns a kernel into a differentiable function of the
backend's tensors.
"""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from keras_jamba import _signature
from keras_jamba._signature import Signature

LIBRARY = Path(__file__).parent / "libkeras_jamba.so"
INSTRUCTION_SETS = {"plain": 1, "avx2": 2, "avx512": 3}
_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_ERRORS = {1: "There is not enough memory", 2: "The processor lacks the instruction set of KERAS_JAMBA_ISA"}


class Array(NamedTuple):
    """Memory of one tensor, contiguous except for the stride between two tokens, `row` elements."""

    address: int
    shape: tuple
    dtype: str
    row: int


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int64), ("row", ctypes.c_int64)]


_THREADS = [("parallel", ctypes.c_void_p), ("pool", ctypes.c_void_p)]


def _structure(integers, members):
    """Returns the ctypes mirror of a structure of keras_jamba.h: integers, then members; a star marks a pointer."""
    fields = [(name, ctypes.c_int64) for name in [*integers.split(), "threads", "isa"]]
    for name in members.split():
        fields.append((name[1:], ctypes.c_void_p) if name[0] == "*" else (name, _Tensor))
    return type("Call", (ctypes.Structure,), {"_fields_": [*fields, *_THREADS]})


@dataclass(frozen=True)
class Kernel(Signature):
    """Function of the C library, with the function of its gradient.

    Attributes:
        number: the number of the forward function in xla_ffi.h; the backward function has the next number.
        backward: whether the library has a backward function. If not, the portable implementation gives the gradient.
        structure: the mirror of the structure in keras_jamba.h. Its integers are the sizes, then the options.
    """

    number: int
    backward: bool
    structure: type

    def field(self, name):
        """Returns a tensor's offset in the structure in bytes, and whether its dtype and stride are there too."""
        kind = dict(self.structure._fields_)[name]
        return getattr(self.structure, name).offset, kind is _Tensor

    def run(self, backward, arrays, options, threads, parallel=None):
        """Calls the library, without Python's global interpreter lock.

        Args:
            backward: whether to call the backward function.
            arrays: `{name: Array or None}` of inputs, outputs and gradients.
            options: `{name: integer}`.
            threads: the number of threads.
            parallel: the address of `GOMP_parallel` if the caller has OpenMP threads. None starts new threads.

        Raises:
            RuntimeError: if memory or the instruction set is missing.
        """
        given = {name: array for name, array in arrays.items() if array is not None}
        sizes = self.sizes({name: x.shape for name, x in given.items()})
        call = self.structure(threads=threads, isa=instruction_set(), parallel=parallel, **sizes, **options)
        for name, x in given.items():
            if isinstance(getattr(call, name), _Tensor):
                setattr(call, name, _Tensor(x.address, _DTYPES[x.dtype], x.row))
            else:
                setattr(call, name, x.address)
        function = f"kj_{self.name}_{'backward' if backward else 'forward'}"
        error = getattr(_library, function)(ctypes.byref(call))
        if error:
            raise RuntimeError(
                f"{_ERRORS[error]}. Received: {function} with {sizes}. Use smaller inputs, or another KERAS_JAMBA_ISA."
            )


def _scan_sizes(shapes):
    (batch, length, channels), states = shapes["u"], shapes["A"][1]
    return dict(batch=batch, length=length, channels=channels, states=states)


CHUNK, WIDEST = 16, 16  # tokens between two checkpoints, and channels per strip, as in keras_jamba.c


def _scan_shapes(sizes):
    batch, length, channels, states = sizes.values()
    # Integer arithmetic that also works on a compiler's symbolic sizes.
    checkpoints = batch * ((length + CHUNK - 1) // CHUNK) * ((channels + WIDEST - 1) // WIDEST * WIDEST) * states
    return [(batch, length, channels), (batch, channels, states), (checkpoints,)]


def _conv_sizes(shapes):
    (batch, length, channels), width = shapes["x"], shapes["kernel"][0]
    return dict(batch=batch, length=length, channels=channels, width=width)


SCAN = Kernel(
    name="scan",
    number=0,
    backward=True,
    inputs=("u", "delta", "A", "B", "C", "D", "z", "bias", "initial", "mask", "segments"),
    differentiable=9,
    outputs=("y", "last", "checkpoints"),
    num_residuals=1,
    options=("softplus",),
    sizes=_scan_sizes,
    shapes=_scan_shapes,
    structure=_structure(
        "batch length channels states softplus",
        "u delta B C z *A *D *bias *initial *mask *segments y *last *checkpoints "
        "grad_y *grad_last grad_u grad_delta grad_B grad_C grad_z *grad_A *grad_D *grad_bias *grad_initial",
    ),
    twice_differentiable_with="reference",
)
CONVOLUTION = Kernel(
    name="conv",
    number=2,
    backward=True,
    inputs=("x", "kernel", "bias", "initial", "mask", "segments"),
    differentiable=4,
    outputs=("y",),
    num_residuals=0,
    options=("silu",),
    sizes=_conv_sizes,
    shapes=lambda sizes: [(sizes["batch"], sizes["length"], sizes["channels"])],
    structure=_structure(
        "batch length channels width silu",
        "x initial *kernel *bias *mask *segments y grad_y grad_x grad_initial *grad_kernel *grad_bias",
    ),
    twice_differentiable_with="portable",
)


def _experts_sizes(shapes):
    (experts, width, hidden), (tokens, per_token) = shapes["up"], shapes["weights"]
    return dict(tokens=tokens, width=width, hidden=hidden, experts=experts, per_token=per_token)


EXPERTS = Kernel(
    name="experts",
    number=4,
    backward=False,
    inputs=("token", "up", "down", "gate", "weights", "indices"),
    differentiable=5,
    outputs=("y",),
    num_residuals=0,
    options=(),
    sizes=_experts_sizes,
    shapes=lambda sizes: [(sizes["tokens"], 1, sizes["width"])],
    structure=_structure("tokens width hidden experts per_token", "token up down gate *weights *indices y"),
    twice_differentiable_with="dense",
)


ATTENTION = Kernel(
    name="attention",
    number=6,
    backward=False,
    **_signature.ATTENTION,
    structure=_structure(
        "batch queries keys heads groups width causal window",
        "query key value *positions *documents *key_positions *key_documents *sinks y",
    ),
)


def _load():
    """Returns the library, or the reason why it cannot be used."""
    if not LIBRARY.exists():
        return "its C library is not built: install a C compiler, then reinstall the package"
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"its C library cannot be loaded: {error}"
    numbers = (ctypes.c_int64 * 6)()
    if hasattr(loaded, "kj_layout"):
        loaded.kj_layout(numbers)
    sizes = [ctypes.sizeof(kernel.structure) for kernel in (SCAN, CONVOLUTION, EXPERTS, ATTENTION)]
    if list(numbers) != [*sizes, CHUNK, WIDEST]:
        return "its C library is of another version: install the package again"
    loaded.kj_isa_available.argtypes = [ctypes.c_int64]
    return loaded


_library = _load()


def why_not():
    """Returns None, or the reason why the library cannot be used."""
    return _library if isinstance(_library, str) else None


def xla_function():
    """Returns the library's entry point for XLA, see xla_ffi.h."""
    return _library.kj_xla


def cores():
    """Returns the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def instruction_set():
    """Returns the number of the instruction set in KERAS_JAMBA_ISA, or 0 for the fastest.

    Raises:
        ValueError: if KERAS_JAMBA_ISA names no instruction set.
    """
    name = os.environ.get("KERAS_JAMBA_ISA")
    if name and name not in INSTRUCTION_SETS:
        raise ValueError(
            f"KERAS_JAMBA_ISA must name one of {list(INSTRUCTION_SETS)}. Received: KERAS_JAMBA_ISA={name!r}. "
            "Unset it for the fastest that the processor has."
        )
    return INSTRUCTION_SETS[name] if name else 0


def instruction_sets():
    """Returns the names of `INSTRUCTION_SETS` that this processor has."""
    return [name for name, number in INSTRUCTION_SETS.items() if _library.kj_isa_available(number)]

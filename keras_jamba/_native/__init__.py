"""The C library: where it lies, its kernels on arrays in memory, and why it cannot be used where it cannot.

Knows addresses, shapes and dtypes, and no backend: whoever calls it owns the memory and keeps it alive meanwhile.
`_backend.kernels.c_kernel_op` makes a function of the backend's tensors, with its gradient, of a kernel.
"""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from keras_jamba._signature import Signature

LIBRARY = Path(__file__).parent / "libkeras_jamba.so"
INSTRUCTION_SETS = {"plain": 1, "avx2": 2, "avx512": 3}
_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_ERRORS = {1: "There is not enough memory", 2: "The processor lacks the instruction set of KERAS_JAMBA_ISA"}


class Array(NamedTuple):
    """Memory of one tensor. All but the way between two tokens, `row` elements, is without gaps."""

    address: int
    shape: tuple
    dtype: str
    row: int


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int64), ("row", ctypes.c_int64)]


_THREADS = [("parallel", ctypes.c_void_p), ("pool", ctypes.c_void_p)]


def _structure(integers, members):
    """A mirror of a structure of keras_jamba.h: integers, then members; those with a star are plain pointers."""
    fields = [(name, ctypes.c_int64) for name in [*integers.split(), "threads", "isa"]]
    for name in members.split():
        fields.append((name[1:], ctypes.c_void_p) if name[0] == "*" else (name, _Tensor))
    return type("Call", (ctypes.Structure,), {"_fields_": [*fields, *_THREADS]})


@dataclass(frozen=True)
class Kernel(Signature):
    """A function of the library, and the one for its gradient.

    Attributes:
        number: of the forward function in xla_ffi.h; the backward one has the next.
        backward: whether the library has one. Where not, the gradient is that of the portable form.
        structure: the mirror of the structure in keras_jamba.h. Its integers are the sizes, then the options.
    """

    number: int
    backward: bool
    structure: type

    def field(self, name):
        """Where a tensor stands in the structure, in bytes, and whether with its dtype and rows."""
        kind = dict(self.structure._fields_)[name]
        return getattr(self.structure, name).offset, kind is _Tensor

    def run(self, backward, arrays, options, threads, parallel=None):
        """Calls the library, without Python's lock.

        `arrays` are inputs, outputs and gradients by name, or None; `parallel` is the address of OpenMP's
        `GOMP_parallel` where the caller has such threads. Without it the call starts threads of its own.
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
            raise RuntimeError(f"{_ERRORS[error]}. Received: {function} with {sizes}. Use less, or another set.")


def _scan_sizes(shapes):
    (batch, length, channels), states = shapes["u"], shapes["A"][1]
    return dict(batch=batch, length=length, channels=channels, states=states)


CHUNK, WIDEST = 16, 16  # tokens between two checkpoints, and channels of a strip, as in keras_jamba.c


def _scan_shapes(sizes):
    batch, length, channels, states = sizes.values()
    # Whole numbers that a compiler may hold as symbols.
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


def _load():
    """The library, or the reason why there is none."""
    if not LIBRARY.exists():
        return "its C library is not built: with a C compiler there, install the package again"
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"its C library cannot be loaded: {error}"
    numbers = (ctypes.c_int64 * 5)()
    if hasattr(loaded, "kj_layout"):
        loaded.kj_layout(numbers)
    sizes = [ctypes.sizeof(kernel.structure) for kernel in (SCAN, CONVOLUTION, EXPERTS)]
    if list(numbers) != [*sizes, CHUNK, WIDEST]:
        return "its C library is of another version: install the package again"
    loaded.kj_isa_available.argtypes = [ctypes.c_int64]
    return loaded


_library = _load()


def why_not():
    """None, or why the library cannot be used."""
    return _library if isinstance(_library, str) else None


def xla_function():
    """The library's one entry for XLA, see xla_ffi.h."""
    return _library.kj_xla


def cores():
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def instruction_set():
    """The number of the set that KERAS_JAMBA_ISA names, 0 for the fastest."""
    name = os.environ.get("KERAS_JAMBA_ISA")
    if name and name not in INSTRUCTION_SETS:
        raise ValueError(
            f"KERAS_JAMBA_ISA must name one of {list(INSTRUCTION_SETS)}. Received: KERAS_JAMBA_ISA={name!r}. "
            "Unset it for the fastest that the processor has."
        )
    return INSTRUCTION_SETS[name] if name else 0


def instruction_sets():
    """Those of `INSTRUCTION_SETS` that this processor has."""
    return [name for name, number in INSTRUCTION_SETS.items() if _library.kj_isa_available(number)]

"""Platforms, values and shapes of tensors, on PyTorch."""

import torch

from keras_jamba._backend.common.tensors import ensure_shape  # noqa: F401
from keras_jamba._backend.torch._fx_tracing import is_tracing


def platform(x=None):
    if x is not None and x.device.type != "meta":
        return "cpu" if x.device.type == "cpu" else "gpu"
    return "gpu" if torch.cuda.is_available() else "cpu"


def has_values(x):
    return x.device.type != "meta"


def concrete_numpy(x):
    traced = needs_static_shapes() or torch.jit.is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    if x.device.type != "cpu" or traced:
        return None
    x = x.detach()
    # NumPy has no bfloat16.
    return (x.float() if x.dtype is torch.bfloat16 else x).numpy()


def needs_static_shapes():
    return torch.compiler.is_compiling() or is_tracing()


def is_traced_by_torchscript():
    return torch.jit.is_tracing()


def can_log():
    # Logging would split the compiled graph.
    return not torch.compiler.is_compiling()


def why_no_split_rows():
    if needs_static_shapes():
        return "its shapes depend on the routing, but a compiler needs static shapes"
    return None


def split_rows(x, counts):
    return x.split(counts.tolist())


def add_slice(x, update, start, axis):
    x.narrow(axis, int(start), update.shape[axis]).add_(update)
    return x


def fill(variable, array):
    name = array.dtype.name
    if name in ("float64", "float32", "float16"):
        variable.assign(torch.from_numpy(array))
    else:
        # NumPy's dtypes of fewer bits are not PyTorch's.
        variable.assign(torch.from_numpy(array.view(f"uint{8 * array.itemsize}")).view(getattr(torch, name)))

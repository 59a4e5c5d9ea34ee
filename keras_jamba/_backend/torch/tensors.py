"""Platforms, values and shapes of tensors, on PyTorch."""

import keras
import torch

from keras_jamba._backend.common.tensors import ensure_shape, top_k  # noqa: F401
from keras_jamba._backend.torch._fx_tracing import is_tracing
from keras_jamba._backend.torch._owned_state import is_owned
from keras_jamba._backend.torch._partial_evaluation import is_captured
from keras_jamba._backend.torch._plain import is_here, is_plain


def as_tensor(x):
    if isinstance(x, keras.Variable):
        x = x.value
    if is_here(x):
        return x
    return keras.ops.convert_to_tensor(x)


def argsort(x):
    # Keras sorts stably, which no exporter to ONNX translates.
    return torch.argsort(x, dim=-1).int()


def take_tokens(x, index):
    # Keras' function fixes the number of rows in an export.
    index = index.long().reshape(*index.shape, *(1 for _ in x.shape[2:]))
    return torch.gather(x, 1, index.expand(-1, -1, *x.shape[2:]))


def is_floating(x):
    # Keras' function takes several times as long, and an op checks ten tensors.
    return x.is_floating_point() if is_plain(x) else keras.backend.is_float_dtype(x.dtype)


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
    if needs_static_shapes() or is_captured():
        return "its shapes depend on the routing, but a compiler needs static shapes"
    return None


def split_rows(x, counts):
    return x.split(counts.tolist())


def block(x, index, size, axis):
    return x.narrow(axis, int(index) * size, size)


def add_to_block(x, update, index, axis):
    block(x, index, update.shape[axis], axis).add_(update)
    return x


def scatter_update(x, index, updates):
    if is_owned(x):
        return x.index_put_(tuple(index.T), updates.to(x.dtype))
    return keras.ops.scatter_update(x, index, updates)


def fill(variable, array):
    name = array.dtype.name
    if name in ("float64", "float32", "float16"):
        variable.assign(torch.from_numpy(array))
    else:
        # NumPy's dtypes of fewer bits are not PyTorch's.
        variable.assign(torch.from_numpy(array.view(f"uint{8 * array.itemsize}")).view(getattr(torch, name)))

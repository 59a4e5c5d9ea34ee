"""The functions of `_backend` on PyTorch, where eager code needs neither compiled loops nor a gradient protocol."""

import torch

from keras_jamba._backend.native_on_torch import native  # noqa: F401


def platform():
    return "gpu" if torch.cuda.is_available() else "cpu"


def host_values(x):
    return x.numpy() if x.device.type == "cpu" and not torch.compiler.is_compiling() else None


def compiling():
    return torch.compiler.is_compiling()


def split(x, counts):
    return x.split(counts.tolist())


def can_recompute():
    return True


def why_not_native(shape):
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "an exported graph must run where the library is not"
    # Where an operator has no rule for it, PyTorch takes the derivative for zero.
    if torch.autograd.forward_ad._current_level >= 0:
        return "it has no forward-mode derivatives"
    return None


def may_log():
    # A line of the log would break the graph in two.
    return not torch.compiler.is_compiling()

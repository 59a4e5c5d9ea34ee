"""Constants of a captured training step."""

import contextlib
import functools

import numpy as np
import torch

from keras_jamba._backend.torch._step_mode import StepMode

_HOST_VALUES = (bool, int, float, tuple, list, np.ndarray)


def without_sync_debug(function, *given):
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        return function(*given)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def in_recomputation():
    """Returns a context with the mode of the step that this thread runs, for code that autograd runs later.

    PyTorch has no active modes in a backward pass.
    """
    return Constants.current() or contextlib.nullcontext()


class Constants(StepMode):
    """Constants that a step copies from host to device. The warm-up step caches them for the capture."""

    def __init__(self):
        super().__init__()
        self.found, self.memory, self.complete = {}, set(), False

    def recording(self):
        self.complete = False
        return self

    def replaying(self):
        self.complete = True
        return self

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.as_tensor or not args or not isinstance(args[0], _HOST_VALUES):
            return function(*args, **kwargs)
        value = np.asarray(args[0])
        key = value.shape, str(value.dtype), value.tobytes(), *(str(kwargs.get(name)) for name in ("dtype", "device"))
        if key not in self.found:
            if self.complete:
                return function(*args, **kwargs)
            self.found[key] = without_sync_debug(functools.partial(function, *args, **kwargs))
            self.memory.add(self.found[key].untyped_storage().data_ptr())
        # A copy, because the caller may write into it.
        return self.found[key].clone()

"""Triton's interpreter on PyTorch CPU tensors. Processes that import this run with TRITON_INTERPRET=1."""

import contextlib
import os
import tempfile

import torch
from triton.runtime import interpreter

from keras_jamba._backend.torch import _triton
from keras_jamba._triton import grouped, tuning


def _with_indices(patch):
    """Adds `__index__`: the interpreter needs it for loop bounds, and NumPy no longer converts one-element arrays."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


interpreter._patch_lang_tensor = _with_indices(interpreter._patch_lang_tensor)


def launch(kernel, grid, inputs, outputs, constants, num_warps, num_stages, into=None):
    """Launches a kernel as a backend does.

    Outputs begin as NaN, and integers as -1, so that values a kernel never writes are detected.
    """
    made = [_unwritten(shape, _triton._DTYPES.get(dtype, dtype)) for shape, dtype in outputs]
    made = [(into or {}).get(i, x) for i, x in enumerate(made)]
    kernel[grid](*inputs, *made, **constants, num_warps=num_warps, num_stages=num_stages)
    return made


def _unwritten(shape, dtype):
    return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype)


@contextlib.contextmanager
def on_an_unknown_device():
    """Simulates an unmeasured device: tuning runs every candidate on its measuring arrays and chooses the last."""
    seconds = iter(range(1000, 0, -1))

    def clock(specs, run):
        arrays = {name: _triton._filled(*spec) for name, spec in specs.items()}
        for names, of in grouped._NAMED.items():
            # The interpreter does not check bounds, so an index out of range would read other memory.
            assert names not in arrays or arrays[names].max() < arrays[of].shape[0]
        run(arrays)
        return float(next(seconds))

    before, _triton._device = _triton._device, lambda: (132, "unknown", False, clock)
    tuning._known.cache_clear()
    with tempfile.TemporaryDirectory() as home:
        os.environ["KERAS_HOME"] = home
        yield
        assert len(tuning._known()) > 0
    del os.environ["KERAS_HOME"]
    _triton._device = before

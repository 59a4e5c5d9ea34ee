"""Triton's interpreter on PyTorch's tensors of a CPU; what imports this runs with TRITON_INTERPRET=1."""

import contextlib
import os
import tempfile

import torch
from triton.runtime import interpreter

from keras_jamba._backend.torch import _triton
from keras_jamba._triton import grouped, tuning


def _with_indices(patch):
    """NumPy makes no number of an array of one any more, for which the interpreter asks where a loop ends."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


interpreter._patch_lang_tensor = _with_indices(interpreter._patch_lang_tensor)


def launch(kernel, grid, inputs, outputs, constants, num_warps, num_stages):
    """As a backend does it; what a kernel does not write is no number, so that it is seen."""
    made = [torch.full(shape, torch.nan, dtype=dtype) for shape, dtype in outputs]
    kernel[grid](*inputs, *made, **constants, num_warps=num_warps, num_stages=num_stages)
    return made


@contextlib.contextmanager
def on_an_unknown_device():
    """Whatever can be chosen is run with the arrays that it would be measured with, and the last is taken."""
    seconds = iter(range(1000, 0, -1))

    def clock(specs, run):
        arrays = {name: _triton._filled(*spec) for name, spec in specs.items()}
        for names, of in grouped._NAMED.items():
            # The interpreter reads whatever lies behind an array.
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

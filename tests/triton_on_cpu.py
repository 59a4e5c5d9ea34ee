"""Triton's interpreter on PyTorch's tensors of a CPU; what imports this runs with TRITON_INTERPRET=1."""

import torch
from triton.runtime import interpreter


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

"""Importing this makes Triton's interpreter work on a CPU with the NumPy that is installed."""

from triton.runtime import interpreter


def _with_indices(patch):
    """NumPy makes no number of an array of one any more, for which the interpreter asks where a loop ends."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


interpreter._patch_lang_tensor = _with_indices(interpreter._patch_lang_tensor)

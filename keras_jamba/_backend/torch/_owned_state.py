"""Tensors of a captured loop, into which its body may write."""

import threading

_of_thread = threading.local()


class OwnedState:
    """A context in which `is_owned` is true for the given tensors, in this thread."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __enter__(self):
        self.before = getattr(_of_thread, "tensors", ())
        _of_thread.tensors = self.tensors

    def __exit__(self, *error):
        _of_thread.tensors = self.before


def is_owned(x):
    """Returns whether `x` is one of these tensors, so that the caller may overwrite it."""
    tensors = getattr(_of_thread, "tensors", ())
    return any(x.data_ptr() == each.data_ptr() and x.shape == each.shape for each in tensors)

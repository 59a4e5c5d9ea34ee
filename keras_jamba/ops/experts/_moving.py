"""Row permutations by gathers, whose gradients are gathers too.

The gradient of a gather is a scatter, which compilers run row by row on a CPU. If every row moves to at most one
place, the gradient is also the gather with the inverse index.
"""

from keras import ops

from keras_jamba import _backend


def take_rows(x, index):
    """Returns the rows of `x` at `index`; zeros where the index is one past the end."""
    return ops.take(ops.pad(x, ((0, 1), (0, 0))), index, axis=0)


def _forward(x, index, inverse):
    return take_rows(x, index), (index, inverse)


def _backward(residuals, gradient):
    return take_rows(gradient, residuals[1]), None, None


_moved = _backend.autodiff.custom_gradient(_forward, _backward)


def moved(x, index, inverse):
    """Returns `take_rows(x, index)`. `inverse` is the place of each row of `x` in the result, or one past the end."""
    return _moved(x, index, inverse) if _backend.compilation.has_jit() else take_rows(x, index)

"""A product in few bits whose result has many."""

from keras import ops

from keras_jamba import _backend

_SHORT = ("bfloat16", "float16")


def product_in_float32(x, matrix):
    """`x @ matrix`, `(..., d)` by `(d, f)` of the same dtype, in float32; gradients are in the dtype of the two."""
    rows = ops.reshape(x, (-1, x.shape[-1]))
    found = _product(rows, matrix) if ops.dtype(x) in _SHORT else ops.cast(ops.matmul(rows, matrix), "float32")
    return ops.reshape(found, (*ops.shape(x)[:-1], matrix.shape[-1]))


def _forward(x, matrix):
    return _backend.numerics.matmul_in_float32(x, matrix), (x, matrix)


def _backward(residuals, gradient):
    x, matrix = residuals
    gradient = ops.cast(gradient, x.dtype)
    return ops.matmul(gradient, ops.transpose(matrix)), ops.matmul(ops.transpose(x), gradient)


_product = _backend.autodiff.custom_gradient(_forward, _backward, _backend.numerics.matmul_in_float32)

"""Matrix products of 16-bit tensors with float32 results."""

from keras import ops

from keras_jamba import _backend

_SHORT = ("bfloat16", "float16")


def product_in_float32(x, matrix):
    """Returns `x @ matrix` in float32, for `(..., d)` and `(d, f)` of one dtype, which their gradients keep."""
    rows = ops.reshape(x, (-1, x.shape[-1]))
    found = _product(rows, matrix) if ops.dtype(x) in _SHORT else plain_product(rows, matrix)
    return ops.reshape(found, (*ops.shape(x)[:-1], matrix.shape[-1]))


def plain_product(rows, matrix):
    """Returns `rows @ matrix` in float32, for `(n, d)` and `(d, f)`. Its gradients of 16-bit tensors are float32."""
    short = ops.dtype(rows) in _SHORT
    return _backend.numerics.matmul_in_float32(rows, matrix) if short else ops.cast(ops.matmul(rows, matrix), "float32")


def _forward(x, matrix):
    return _backend.numerics.matmul_in_float32(x, matrix), (x, matrix)


def _backward(residuals, gradient):
    x, matrix = residuals
    gradient = ops.cast(gradient, x.dtype)
    return ops.matmul(gradient, ops.transpose(matrix)), ops.matmul(ops.transpose(x), gradient)


_product = _backend.autodiff.custom_gradient(_forward, _backward, _backend.numerics.matmul_in_float32)

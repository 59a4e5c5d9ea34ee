"""Cross-entropy of linear logits in chunks of tokens, without the logits of all tokens.

The forward pass keeps one number per token, the logarithm of the sum of exponentials. The backward pass computes the
logits of each chunk again, and adds up the gradient of the kernel over the chunks.
"""

import functools
from typing import NamedTuple

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Tensor
from keras_jamba.ops import _checks, _sharding
from keras_jamba.ops._product import plain_product
from keras_jamba.ops.quantization import QuantizedTensor, dequantized

# Bytes of the float32 logits of a chunk, how many times as many on a GPU, and the fewest tokens of a chunk. Each chunk
# reads and writes the gradient of the kernel.
CHUNK_BYTES, _ON_GPU, _FEWEST = 2**26, 4, 128
# Tokens of a chunk if a TensorFlow graph does not know the number of tokens. The last chunk is filled with zeros.
_OF_UNKNOWN = 512
_ONCE = (
    "linear_cross_entropy has no second derivatives on PyTorch. Received: a gradient of its gradient. Compute it on "
    "JAX, or take keras.ops.sparse_categorical_crossentropy of all logits."
)


def linear_cross_entropy(
    features: Tensor,
    kernel: Tensor | QuantizedTensor,
    targets: Tensor,
    transposed: bool = False,
    kernel_gradient: bool = True,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the cross-entropy of the logits `features @ kernel`, and the most likely class, of each token.

    Only the logits of one chunk of tokens are in memory at a time, in the forward and in the backward pass. Products
    are in the dtype of the features, softmax and sums in float32.

    Args:
        features: `(..., d)` in floating point.
        kernel: `(d, v)` in floating point, or a `QuantizedTensor`, which gets no gradient.
        targets: `(...)` integers from 0 to v - 1. Another target has the loss NaN.
        transposed: whether the kernel is `(v, d)`, as an embedding is. Not for a `QuantizedTensor`.
        kernel_gradient: whether the kernel gets a gradient. False saves a third of the backward pass.
        chunk_size: tokens per chunk. None is as many as have 64 MiB of logits, 256 MiB on a GPU, but at least 128.

    Returns:
        Losses `(...)` float32, and predicted classes `(...)` int32, which have no gradient.

    Raises:
        ValueError: for shapes that do not fit together, and for a chunk_size below 1.

    Example:
        >>> import numpy as np
        >>> from keras_jamba.ops import linear_cross_entropy
        >>> features, kernel = np.ones((2, 3, 4), "float32"), np.zeros((4, 8), "float32")
        >>> losses, predicted = linear_cross_entropy(features, kernel, np.zeros((2, 3), "int32"))
        >>> losses.shape, round(float(losses[0, 0]), 4)  # log(8)
        ((2, 3), 2.0794)
    """
    features, targets = ops.convert_to_tensor(features), ops.cast(targets, "int32")
    parts, mode = _parts(kernel)
    width = _width(features, kernel, targets, transposed)
    if chunk_size is not None:
        _checks.check_integer("chunk_size", chunk_size)
    trains = kernel_gradient and mode is None

    def local(features, targets, kernel, scale, zero):
        rows = ops.reshape(features, (-1, features.shape[-1]))
        size = chunk_size or tokens_per_chunk(rows.shape[0], width, _backend.tensors.platform(rows))
        given = [x for x in (kernel, scale, zero) if x is not None]
        run = _differentiable(_Chunks(size, transposed, trains, mode))
        losses, predicted = run(rows, ops.reshape(targets, (-1,)), *given)
        return ops.reshape(losses, ops.shape(targets)), ops.reshape(predicted, ops.shape(targets))

    clipped = ops.clip(targets, 0, width - 1)
    rank = len(targets.shape)
    letters = {"features": "b" + "t" * rank, "targets": ("b" + "t" * rank)[:rank]}
    letters |= {name: "d" * len(x.shape) for name, x in parts.items() if x is not None}
    tensors = {"features": features, "targets": clipped, **parts}
    results = [letters["targets"]] * 2
    losses, predicted = _sharding.shard_map(local, tensors, letters, results)
    # sqrt(-1) is NaN. PyTorch would copy a constant to the device and synchronise.
    return losses + ops.sqrt(ops.cast(ops.equal(targets, clipped), "float32") - 1), predicted


def tokens_per_chunk(count: int | None, width: int, platform: str) -> int:
    """Returns the tokens per chunk for `count` tokens, None if unknown, and `width` classes."""
    most = max(_FEWEST, CHUNK_BYTES * (_ON_GPU if platform == "gpu" else 1) // (4 * width))
    if count is None:
        return min(most, _OF_UNKNOWN)
    return -(-count // max(1, -(-count // most))) or 1


def _parts(kernel):
    """Returns the tensors of a kernel by name, and its quantization mode or None."""
    if isinstance(kernel, QuantizedTensor):
        return dict(zip(("kernel", "scale", "zero"), kernel, strict=True)), "int8" if kernel.zero is None else "int4"
    return {"kernel": ops.convert_to_tensor(kernel), "scale": None, "zero": None}, None


def _width(features, kernel, targets, transposed):
    """Returns the number of classes v; raises ValueError for shapes that do not fit together."""
    shape = tuple(kernel.shape)
    of_kernel, width = shape[::-1] if transposed else shape
    fits = tuple(features.shape[:-1]) == tuple(targets.shape) or None in (*features.shape, *targets.shape)
    if of_kernel != features.shape[-1] or not fits or transposed and isinstance(kernel, QuantizedTensor):
        raise ValueError(
            "features must be (..., d), targets (...), and the kernel (d, v), or (v, d) and floats if transposed. "
            f"Received: features of shape {tuple(features.shape)}, targets of shape {tuple(targets.shape)}, a "
            f"{type(kernel).__name__} of shape {shape} and transposed={transposed}. Pass one target per token."
        )
    return width


@functools.cache
def _differentiable(chunks):
    """Returns the differentiable function of rows, targets and the tensors of the kernel."""
    return _backend.autodiff.custom_gradient(chunks.forward, chunks.backward, once=_ONCE)


class _Chunks(NamedTuple):
    """Forward and backward pass in chunks of `size` rows."""

    size: int
    transposed: bool
    trains: bool
    mode: str | None

    def forward(self, rows, targets, *kernel):
        matrix, divisor = self.matrix(rows.dtype, kernel)

        def step(carry, chunk):
            logits = self.logits(chunk[0], matrix, divisor)
            return carry, _backend.numerics.cross_entropy_of_rows(logits, chunk[1])

        chunks = self.split(rows), self.split(targets)
        _, (logs, losses, predicted) = _backend.compilation.scan(step, ops.zeros((), "int32"), chunks)
        outputs = _joined(losses, rows), _joined(predicted, rows)
        return outputs, (rows, targets, kernel, logs)

    def backward(self, residuals, gradients):
        rows, targets, kernel, logs = residuals
        matrix, divisor = self.matrix(rows.dtype, kernel)
        back = kernel[0] if self.transposed else ops.transpose(matrix)
        back = ops.cast(back, rows.dtype)

        def step(total, chunk):
            rows, targets, logs, factors = chunk
            logits = self.logits(rows, matrix, divisor)
            dtype = keras.backend.standardize_dtype(rows.dtype)
            grads = _backend.numerics.cross_entropy_gradient(logits, logs, targets, factors, dtype)
            grads = _through_division(grads, divisor)
            if self.trains:
                pair = (ops.transpose(grads), rows) if self.transposed else (ops.transpose(rows), grads)
                total = _backend.numerics.add_matmul(total, *pair)
            return total, ops.matmul(grads, back)

        chunks = self.split(rows), self.split(targets), logs, self.split(gradients[0])
        total = ops.zeros(kernel[0].shape if self.trains else (), "float32")
        total, grad_rows = _backend.compilation.scan(step, total, chunks)
        grad_kernel = ops.cast(total, kernel[0].dtype) if self.trains else None
        return _joined(grad_rows, rows), None, grad_kernel, *(None for _ in kernel[1:])

    def matrix(self, dtype, kernel):
        """Returns the matrix `(d, v)` in `dtype`, and a divisor `(v,)` of the products or None."""
        if self.mode == "int8":
            return ops.cast(kernel[0], dtype), kernel[1]
        if self.mode == "int4":
            return dequantized(QuantizedTensor(*kernel), dtype), None
        matrix = ops.cast(kernel[0], dtype)
        return ops.transpose(matrix) if self.transposed else matrix, None

    def logits(self, rows, matrix, divisor):
        """Returns the float32 logits of rows, rounded as those of the model's head."""
        if self.mode is None:
            return plain_product(rows, matrix)
        products = ops.cast(ops.matmul(rows, matrix), "float32")
        return products if divisor is None else ops.cast(ops.cast(products / divisor, rows.dtype), "float32")

    def split(self, x):
        """Returns `x (n, ...)` as `(chunks, size, ...)`, at least one chunk, with zeros that complete the last one."""
        count = ops.shape(x)[0]
        added = self.size if isinstance(count, int) and count == 0 else -count % self.size
        if not isinstance(added, int) or added:
            x = ops.concatenate([x, ops.zeros((added, *x.shape[1:]), x.dtype)])
        return ops.reshape(x, (-1, self.size, *x.shape[1:]))


def _joined(x, like):
    """Returns `x (chunks, size, ...)` as rows `(n, ...)`, without those that completed the last chunk."""
    return ops.reshape(x, (-1, *x.shape[2:]))[: ops.shape(like)[0]]


def _through_division(grads, divisor):
    return grads if divisor is None else ops.cast(ops.cast(grads, "float32") / divisor, grads.dtype)

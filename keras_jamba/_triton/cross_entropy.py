"""Launches of the cross-entropy kernels."""

from keras_jamba._triton.tuning import power

# Classes per tile. Larger tiles spill registers.
_WIDEST = 4096


def of_rows(gpu, logits, targets):
    """Computes the cross-entropy of each row.

    Args:
        gpu: a `Gpu`.
        logits: `(n, v)` float32, contiguous.
        targets: `(n,)` int32, the classes.

    Returns:
        `(logs, losses, predicted)`: the logarithm of the sum of exponentials, `(n,)` float32; the loss, `(n,)` float32;
        and the first of the largest logits, `(n,)` int32.
    """
    n, classes = logits.shape
    outputs = [((n,), "float32"), ((n,), "float32"), ((n,), "int32")]
    constants = dict(classes=classes, BLOCK=_block(classes))
    inputs = (logits, targets)
    return gpu.launch(_kernels().cross_entropy_of_rows, (n,), inputs, outputs, constants, num_warps=8, num_stages=1)


def gradient(gpu, logits, logs, targets, factors, dtype):
    """Returns `factors (exp(logits - logs) - is_target)`, `(n, v)` in `dtype`; see `of_rows`. `factors`: `(n,)`."""
    n, classes = logits.shape
    block = _block(classes)
    inputs = (logits, logs, targets, factors)
    grid = (n, -(-classes // block))
    constants = dict(classes=classes, BLOCK=block)
    outputs = [((n, classes), dtype)]
    kernel = _kernels().cross_entropy_gradient
    return gpu.launch(kernel, grid, inputs, outputs, constants, num_warps=8, num_stages=1)[0]


def _block(classes):
    return min(_WIDEST, power(classes))


def _kernels():
    # Imported lazily: Triton may be missing.
    from keras_jamba._triton import cross_entropy_kernels

    return cross_entropy_kernels

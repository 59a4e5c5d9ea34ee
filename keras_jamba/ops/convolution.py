"""The causal depthwise convolution in front of the scan."""

from keras import ops

from keras_jamba.ops import _checks


def causal_depthwise_conv(x, kernel, bias=None):
    """Every channel convolved with its own kernel over the present and the k - 1 tokens before it.

    `y_t = bias + sum over i of kernel[i] * x_{t - (k - 1) + i}`, zeros before the first token: the
    last row of the kernel meets the present token (a cross-correlation, as in PyTorch's `conv1d`).

    Computed as k shifted multiply-adds, which compilers fuse; the grouped convolutions of the three
    backends take up to twice a whole training step longer on a CPU.

    Args:
        x: `(b, t, e)`.
        kernel: `(k, e)`.
        bias: `(e,)` or None.

    Returns:
        `(b, t, e)` in the dtype of `x`.

    Raises:
        ValueError: for shapes that do not fit together or dtypes that are not floating.
    """
    tensors = {"x": x, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    tensors = {name: ops.convert_to_tensor(value) for name, value in tensors.items()}
    _checks.check_floating(tensors)
    _checks.check_shapes(tensors, {"x": "bte", "kernel": "ke", "bias": "e"})
    x = tensors["x"]
    kernel = ops.cast(tensors["kernel"], x.dtype)
    width, length = kernel.shape[0], ops.shape(x)[1]
    padded = ops.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    y = kernel[-1] * x
    for i in range(width - 1):
        y = y + kernel[i] * padded[:, i : i + length]
    return y if bias is None else y + ops.cast(tensors["bias"], x.dtype)

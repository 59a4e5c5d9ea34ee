"""The causal depthwise convolution in front of the scan."""

from keras import ops

from keras_jamba.ops import _checks
from keras_jamba.ops._tokens import compaction


def causal_depthwise_conv(
    x,
    kernel,
    bias=None,
    initial_state=None,
    return_last_state=False,
    *,
    mask=None,
    segment_ids=None,
):
    """Every channel convolved with its own kernel over the present and the k - 1 tokens before it.

    `y_t = bias + sum over i of kernel[i] * x_{t - (k - 1) + i}`, the initial state before the first token:
    the last row of the kernel meets the present token (a cross-correlation, as in PyTorch's `conv1d`).

    Computed as k shifted multiply-adds, which compilers fuse; the grouped convolutions of the three
    backends take up to twice a whole training step longer on a CPU.

    Args:
        x: `(b, t, e)`.
        kernel: `(k, e)`.
        bias: `(e,)` or None.
        initial_state: `(b, k - 1, e)`, the inputs before the first token; None is zeros.
        return_last_state: whether to return the last k - 1 inputs too.
        mask: `(b, t)` bool or None. Tokens where it is False do not exist for the others: windows reach
            over them to the real ones before, and the last state is that of the last real ones. The
            output there is zero.
        segment_ids: `(b, t)` integers or None: the document of each token, documents one after the other.
            Windows do not reach into the document before. The initial state belongs to the first.

    Returns:
        `(b, t, e)` in the dtype of `x`, or that and the last state `(b, k - 1, e)` in the same dtype.

    Raises:
        ValueError: for shapes that do not fit together or dtypes that are not floating.
    """
    tensors = {"x": x, "kernel": kernel, "bias": bias, "initial_state": initial_state}
    tensors = {name: ops.convert_to_tensor(value) for name, value in tensors.items() if value is not None}
    _checks.check_floating(tensors)
    x, kernel = tensors["x"], ops.cast(tensors["kernel"], tensors["x"].dtype)
    width = kernel.shape[0]
    _check_shapes(tensors, width)
    mask, segment_ids = _checks.check_tokens(mask, segment_ids, x.shape)

    tokens, rank = x, None
    if mask is not None:
        order, rank = compaction(mask)
        tokens = ops.take_along_axis(x, order[..., None], axis=1)
        segment_ids = None if segment_ids is None else ops.take_along_axis(segment_ids, order, axis=1)
    if initial_state is None:
        window = ops.pad(tokens, ((0, 0), (width - 1, 0), (0, 0)))
    else:
        window = ops.concatenate([ops.cast(tensors["initial_state"], x.dtype), tokens], axis=1)
    documents = None if segment_ids is None else _documents(segment_ids, width)
    y = _shifted_sum(window, kernel, documents)
    y = y if bias is None else y + ops.cast(tensors["bias"], x.dtype)
    if mask is not None:
        y = ops.where(mask[..., None], ops.take_along_axis(y, rank[..., None], axis=1), 0.0)
    if not return_last_state:
        return y
    return y, _last_state(window, documents, mask, width)


def _check_shapes(tensors, width):
    state = tensors.get("initial_state")
    if state is not None and (len(state.shape) != 3 or state.shape[1] != width - 1):
        raise ValueError(
            f"initial_state must have the shape (b, k - 1, e) with k={width}. Received: initial_state.shape="
            f"{tuple(state.shape)}. Pass the last state that a kernel of the same width returned."
        )
    letters = {"x": "bte", "kernel": "ke", "bias": "e", "initial_state": "bse"}
    _checks.check_shapes(tensors, letters)


def _documents(segment_ids, width):
    """The document of each row of the window; those of the initial state are of the first."""
    return ops.concatenate([ops.repeat(segment_ids[:, :1], width - 1, axis=1), segment_ids], axis=1)


def _shifted_sum(window, kernel, documents):
    width = kernel.shape[0]
    length = ops.shape(window)[1] - (width - 1)
    y = kernel[-1] * window[:, width - 1 :]
    for i in range(width - 1):
        tap = kernel[i] * window[:, i : i + length]
        if documents is not None:
            same = ops.equal(documents[:, i : i + length], documents[:, width - 1 :])
            tap = ops.where(same[..., None], tap, 0.0)
        y = y + tap
    return y


def _last_state(window, documents, mask, width):
    """The k - 1 rows up to the last real one, zeros in the place of another document's than the last one's."""
    length = ops.shape(window)[1] - (width - 1)
    rows = ops.arange(width - 1, dtype="int32")[None]
    if mask is None:
        rows = rows + length
    else:
        rows = rows + ops.sum(ops.cast(mask, "int32"), axis=1, keepdims=True)
    rows = ops.broadcast_to(rows, (ops.shape(window)[0], width - 1))
    state = ops.take_along_axis(window, rows[..., None], axis=1)
    if documents is None or width == 1:
        return state
    last = ops.take_along_axis(documents, rows, axis=1)
    return ops.where(ops.equal(last, last[:, -1:])[..., None], state, 0.0)

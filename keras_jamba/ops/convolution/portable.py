"""The convolution as w shifted multiply-adds, which compilers fuse.

On a CPU, the grouped convolutions of the three backends cost up to two more training-step times.
"""

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops._repeat import repeated
from keras_jamba.ops._tokens import compaction, document_numbers, zero_padding


def why_not(call):
    return None


def run(x, kernel, bias, initial_state, mask, segment_ids, silu):
    width = kernel.shape[0]
    kernel = ops.cast(kernel, x.dtype)
    tokens = x
    if mask is not None:
        order, rank = compaction(mask)
        tokens = _backend.tensors.take_tokens(zero_padding(x, mask), order)
        segment_ids = None if segment_ids is None else _backend.tensors.take_tokens(segment_ids, order)
    # The real tokens are in order here, so equal numbers mean the same document.
    numbers = None if segment_ids is None else document_numbers(segment_ids, None)
    if initial_state is None:
        window = ops.pad(tokens, ((0, 0), (width - 1, 0), (0, 0)))
    else:
        window = ops.concatenate([ops.cast(initial_state, x.dtype), tokens], axis=1)
    y = _shifted_sum(window, kernel, numbers)
    y = y if bias is None else y + ops.cast(bias, x.dtype)
    y = ops.silu(y) if silu else y
    if mask is None:
        return y
    return ops.where(ops.expand_dims(mask, 2), _backend.tensors.take_tokens(y, rank), 0.0)


def _shifted_sum(window, kernel, numbers):
    width = kernel.shape[0]
    length = ops.shape(window)[1] - (width - 1)
    if numbers is not None:
        # The tokens before the row belong to its first document.
        before = repeated(numbers[:, :1], width - 1, axis=1)
        documents = ops.concatenate([before, numbers], axis=1)
    y = kernel[-1] * window[:, width - 1 :]
    for i in range(width - 1):
        tap = kernel[i] * window[:, i : i + length]
        if numbers is not None:
            same = ops.equal(documents[:, i : i + length], numbers)
            tap = ops.where(ops.expand_dims(same, 2), tap, 0.0)
        y = y + tap
    return y

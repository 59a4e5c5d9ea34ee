"""The convolution in Triton, on a GPU."""

from keras import ops

from keras_jamba import _backend
from keras_jamba._triton import convolution as kernels
from keras_jamba.ops._implementations import in_short_or_single
from keras_jamba.ops._repeat import repeated
from keras_jamba.ops._tokens import compaction, document_numbers
from keras_jamba.ops.convolution import portable


def _portable(tensors, options):
    x, kernel, bias, initial_state, mask, segment_ids, *_ = tensors
    return (portable.run(x, kernel, bias, initial_state, mask, segment_ids, silu=bool(options[0])),)


_function = _backend.kernels.triton_op(kernels.CONVOLUTION, _portable)


def why_not(call):
    if call.platform != "gpu":
        return "it requires a GPU"
    if reason := _backend.kernels.why_no_triton_op(call.shape):
        return reason
    if not all(isinstance(size, int) for size in call.shape):
        return "it requires static shapes"
    if call.width > kernels.WIDEST:
        return f"it supports kernels of at most {kernels.WIDEST} tokens"
    return None


def run(x, kernel, bias, initial_state, mask, segment_ids, silu):
    dtype = x.dtype
    x = in_short_or_single(x)
    initial_state = None if initial_state is None else ops.cast(initial_state, x.dtype)
    kernel, bias = (x if x is None else ops.cast(x, "float32") for x in (kernel, bias))
    order = counts = None
    numbers = segment_ids
    if mask is not None:
        order, _ = compaction(mask)
        counts = ops.sum(ops.cast(mask, "int32"), axis=1)
        numbers = None if segment_ids is None else _backend.tensors.take_tokens(segment_ids, order)
    reach = None if numbers is None else _reach(document_numbers(numbers, None), kernel.shape[0])
    given = (x, kernel, bias, initial_state, mask, segment_ids, reach, order, counts)
    return ops.cast(_function(given, (int(silu),))[0], dtype)


def _reach(numbers, width):
    """Returns `(b, t)`: how many of the w - 1 tokens before each token belong to its document.

    The tokens before the row belong to its first document.
    """
    length = numbers.shape[1]
    before = repeated(numbers[:, :1], width - 1, axis=1)
    documents = ops.concatenate([before, numbers], axis=1)
    same = [ops.equal(documents[:, i : i + length], numbers) for i in range(width - 1)]
    return sum((ops.cast(x, "int32") for x in same), ops.zeros_like(numbers))

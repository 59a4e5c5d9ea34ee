"""The convolution in the C library, on a CPU."""

from keras import ops

from keras_jamba import _backend, _native
from keras_jamba.ops._implementations import in_short_or_single
from keras_jamba.ops.convolution import portable


def _portable(tensors, options):
    x, kernel, bias, initial_state, mask, segment_ids = tensors
    return (portable.run(x, kernel, bias, initial_state, mask, segment_ids, silu=bool(options[0])),)


_function = _backend.kernels.c_kernel_op(_native.CONVOLUTION, _portable)


def why_not(call):
    return _native.why_not() or _backend.kernels.why_no_c_kernel(call.shape)


def run(x, kernel, bias, initial_state, mask, segment_ids, silu):
    dtype = x.dtype
    x, initial_state = map(in_short_or_single, (x, initial_state))
    kernel, bias = (x if x is None else ops.cast(x, "float32") for x in (kernel, bias))
    (y,) = _function((x, kernel, bias, initial_state, mask, segment_ids), (int(silu),))
    return ops.cast(y, dtype)

"""The selective scan in the C library, on a CPU."""

from keras import ops

from keras_jamba import _backend, _native
from keras_jamba.ops._implementations import in_short_or_single
from keras_jamba.ops.scan import portable


def _portable(tensors, options):
    u, delta, A, B, C, D, z, bias, initial_state, mask, segment_ids = tensors
    (softplus,) = options
    return portable.run(u, delta, A, B, C, D, z, bias, bool(softplus), initial_state, mask, segment_ids)


_function = _backend.kernels.c_kernel_op(_native.SCAN, _portable)


def why_not(call):
    return _native.why_not() or _backend.kernels.why_no_c_kernel(call.shape)


def run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, segment_ids):
    dtype = u.dtype
    u, delta, B, C, z = map(in_short_or_single, (u, delta, B, C, z))
    A, D, delta_bias, initial_state = (
        x if x is None else ops.cast(x, "float32") for x in (A, D, delta_bias, initial_state)
    )
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, mask, segment_ids)
    y, last_state = _function(tensors, (int(delta_softplus),))
    return ops.cast(y, dtype), last_state

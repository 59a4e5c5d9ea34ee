"""The selective scan in Triton, on a GPU."""

from keras import ops

from keras_jamba import _backend
from keras_jamba._triton import scan as kernels
from keras_jamba.ops._implementations import in_short_or_single
from keras_jamba.ops._tokens import begins_document
from keras_jamba.ops.scan import portable


def _portable(tensors, options):
    u, delta, A, B, C, D, z, bias, initial_state, mask, segment_ids, _ = tensors
    (softplus,) = options
    return portable.run(u, delta, A, B, C, D, z, bias, bool(softplus), initial_state, mask, segment_ids)


_function = _backend.kernels.triton_op(kernels.SCAN, _portable)


def why_not(call):
    if call.platform != "gpu":
        return "it requires a GPU"
    if reason := portable.why_not(call) or _backend.kernels.why_no_triton_op(call.shape):
        return reason
    if not all(isinstance(size, int) for size in (*call.shape, call.states)):
        return "it requires static shapes"
    if call.states > kernels.MOST_STATES:
        return f"it supports at most {kernels.MOST_STATES} states per channel"
    return None


def run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, segment_ids):
    dtype = u.dtype
    u, delta, B, C, z = map(in_short_or_single, (u, delta, B, C, z))
    A, D, delta_bias, initial_state = (
        x if x is None else ops.cast(x, "float32") for x in (A, D, delta_bias, initial_state)
    )
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, mask, segment_ids, _flags(mask, segment_ids))
    y, last_state = _function(tensors, (int(delta_softplus),))
    return ops.cast(y, dtype), last_state


def _flags(mask, segment_ids):
    """Returns `(b, t)` int8 flags: 1 for a real token, RESET for one that begins a document; None without any."""
    if mask is None and segment_ids is None:
        return None
    real = ops.ones_like(segment_ids, "int8") if mask is None else ops.cast(mask, "int8")
    if segment_ids is None:
        return real
    return real + kernels.RESET * ops.cast(begins_document(segment_ids, mask), "int8")

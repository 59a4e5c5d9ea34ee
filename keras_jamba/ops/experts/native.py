"""The chosen experts of a few tokens in the C library, which reads the weights once and in place."""

from keras import ops

from keras_jamba import _backend, _native
from keras_jamba.ops._implementations import in_short_or_single
from keras_jamba.ops.experts import dense


def _portable(tensors, options):
    token, up, down, gate, weights, indices = tensors
    return (dense.run(token[:, 0], weights, indices, up, down, gate)[:, None],)


_function = _backend.kernels.c_kernel_op(_native.EXPERTS, _portable)


def why_not(call):
    if call.limited:
        return "it does not support capacity_factor"
    if call.platform != "cpu":
        return "it requires a CPU"
    if call.tokens is None or call.tokens > dense.FEW:
        return f"it requires a static number of at most {dense.FEW} tokens"
    if call.is_quantized:
        return "it does not support quantized banks"
    return _native.why_not() or _backend.kernels.why_no_c_kernel((call.tokens, call.per_token))


def run(tokens, weights, indices, up_bank, down_bank, gate_bank):
    token, up, down, gate = map(in_short_or_single, (tokens, up_bank, down_bank, gate_bank))
    weights, indices = ops.cast(weights, "float32"), ops.cast(indices, "int32")
    (y,) = _function((token[:, None], up, down, gate, weights, indices), ())
    return ops.cast(y[:, 0], tokens.dtype)

"""The chosen experts of a few tokens as the C library computes them: the weights are read once, where they lie."""

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
        return "it drops no token"
    if call.platform != "cpu":
        return "it is for a CPU"
    if call.tokens is None or call.tokens > dense.FEW:
        return f"it is for {dense.FEW} tokens at most, a number known beforehand"
    if call.is_quantized:
        return "it reads banks in floating point"
    return _native.why_not() or _backend.kernels.why_no_c_kernel((call.tokens, call.per_token))


def run(tokens, weights, indices, up_bank, down_bank, gate_bank):
    token, up, down, gate = map(in_short_or_single, (tokens, up_bank, down_bank, gate_bank))
    weights, indices = ops.cast(weights, "float32"), ops.cast(indices, "int32")
    (y,) = _function((token[:, None], up, down, gate, weights, indices), ())
    return ops.cast(y[:, 0], tokens.dtype)

"""The fused attention of the backend, for one document without padding, window or cache."""

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba.ops._sharding import with_their_queries

# Up to this number of pairs of queries and keys, loops over blocks cost a CPU more than they save.
FEW_PAIRS = 512 * 512 if _backend.numerics.has_fused_attention() else 256 * 256
# The error of a second derivative through a gradient that is written by hand.
ONCE = (
    "Attention in blocks has no second derivatives on PyTorch. Received: a gradient of its gradient. Compute it on JAX "
    "with implementation='dense'."
)


def why_not(call):
    if not call.plain:
        return "it takes no padding, documents, windows or offsets"
    fused = call.platform != "cpu" or _backend.numerics.has_fused_attention()
    if not (fused or call.requested) and call.exceeds(FEW_PAIRS):
        return "it needs memory for all pairs of tokens"
    return None


def run(query, key, value, causal=False, mask=None):
    """Returns attention over all pairs of tokens; `mask` `(b, t, s)` bool or None. It replaces `causal`."""
    mask = None if mask is None else ops.expand_dims(mask, 1)
    query, key, value = with_their_queries(query, key, value)
    dtype = keras.backend.standardize_dtype(query.dtype)
    if dtype == "float16" and _backend.tensors.platform() == "cpu":
        # XLA on a CPU: "The precision 'F16_F16_F32' is not supported by dot_general".
        query, key, value = (ops.cast(x, "float32") for x in (query, key, value))
    if mask is None:
        return ops.cast(_backend.numerics.unmasked_attention(query, key, value, causal), dtype)
    return ops.cast(_backend.numerics.masked_attention(query, key, value, mask), dtype)

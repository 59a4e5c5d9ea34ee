"""Numerics that JAX and TensorFlow share."""

import keras


def cross_entropy_of_rows(logits, targets):
    logs = keras.ops.logsumexp(logits, axis=-1)
    of_target = keras.ops.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return logs, logs - of_target, keras.ops.argmax(logits, axis=-1)


def cross_entropy_gradient(logits, logs, targets, factors, dtype):
    # XLA fuses the comparison: no tensor holds it.
    classes = keras.ops.arange(logits.shape[-1], dtype="int32")
    is_target = keras.ops.cast(keras.ops.equal(classes, targets[:, None]), "float32")
    return keras.ops.cast((keras.ops.exp(logits - logs[:, None]) - is_target) * factors[:, None], dtype)


def matmul(x, y):
    return keras.ops.matmul(x, y)


def rms_norm(x, scale, epsilon):
    return keras.ops.rms_normalization(x, scale, epsilon=epsilon)


def plus_matmul(y, x, matrix):
    return y + keras.ops.matmul(x, matrix)


def swiglu(gate, up):
    return keras.ops.silu(gate) * up


def has_fused_attention():
    return False


def unmasked_attention(query, key, value, causal):
    return keras.ops.dot_product_attention(query, *_repeated(query, key, value), is_causal=causal)


def masked_attention(query, key, value, mask):
    return keras.ops.dot_product_attention(query, *_repeated(query, key, value), mask=mask)


def _repeated(query, key, value):
    # On TensorFlow, keras.ops.dot_product_attention repeats a single key-value head wrongly.
    shape = (*keras.ops.shape(key)[:2], query.shape[2], key.shape[3])
    return (keras.ops.broadcast_to(x, shape) if x.shape[2] == 1 else x for x in (key, value))

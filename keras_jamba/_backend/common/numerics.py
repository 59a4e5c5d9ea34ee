"""Numerics that JAX and TensorFlow share."""

import keras


def rms_norm(x, scale, epsilon):
    return keras.ops.rms_normalization(x, scale, epsilon=epsilon)


def has_fused_attention():
    return False


def masked_attention(query, key, value, mask):
    return keras.ops.dot_product_attention(query, key, value, mask=mask)

"""Matrix products and norms, on TensorFlow."""

import tensorflow as tf

from keras_jamba._backend.common import numerics
from keras_jamba._backend.common.exporting_state import exports_for_other_runtime
from keras_jamba._backend.common.numerics import (  # noqa: F401
    cross_entropy_gradient,
    cross_entropy_of_rows,
    has_fused_attention,
    masked_attention,
    matmul,
    plus_matmul,
    rms_norm,
    swiglu,
)
from keras_jamba._backend.common.unavailable import refuse

_NO_GROUPED_MATMUL = "TensorFlow has no grouped matrix product"


def unmasked_attention(query, key, value, causal):
    if not (causal and exports_for_other_runtime()):
        return numerics.unmasked_attention(query, key, value, causal)
    # Keras adds axes to the mask of open sizes in a way that LiteRT lacks.
    places = [tf.range(tf.shape(x)[1]) for x in (query, key)]
    seen = tf.expand_dims(places[0], 1) >= tf.expand_dims(places[1], 0)
    return numerics.masked_attention(query, key, value, tf.expand_dims(tf.expand_dims(seen, 0), 0))


def matmul_in_float32(x, y):
    return tf.cast(tf.matmul(x, y), "float32")


def add_matmul(total, x, y):
    return total + matmul_in_float32(x, y)


def grouped_matmul(x, bank, counts, transpose_rhs=False):
    refuse("grouped_matmul", _NO_GROUPED_MATMUL, "why_no_grouped_matmul(...)")


def grouped_matmul_weight_grad(a, b, counts):
    refuse("grouped_matmul_weight_grad", _NO_GROUPED_MATMUL, "why_no_grouped_matmul(...)")


def why_no_grouped_matmul(platform, dtype, sizes):
    return _NO_GROUPED_MATMUL


def prefers_grouped_matmul():
    return False

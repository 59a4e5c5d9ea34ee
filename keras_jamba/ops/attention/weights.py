"""The weights of attention, for pictures and for readers."""

import numpy as np
from keras import ops

from keras_jamba._typing import Tensor
from keras_jamba.ops import _checks
from keras_jamba.ops._repeat import repeated


def attention_weights(
    query: Tensor, key: Tensor, causal: bool = False, window: int | None = None, sinks: int = 0
) -> Tensor:
    """Computes the softmax of `grouped_query_attention`: the weight of each value per query, O(t^2) in memory.

    Args:
        query: `(b, t, h, c)`.
        key: `(b, t, g, c)`, h a multiple of g; query head i reads key-value head `i // (h / g)`.
        causal: whether token i sees only tokens 0 to i.
        window: None, or the window in tokens: a token sees tokens at a distance below `window`, only earlier ones if
            causal.
        sinks: the number of first tokens that the window does not hide. Needs a window.

    Returns:
        `(b, h, t, t)` float32, queries before keys. Every row sums to 1; the weight of an invisible key is exactly 0.

    Raises:
        ValueError: if the shapes do not match.

    Reference:
        [Vaswani et al. (2017)](https://arxiv.org/abs/1706.03762), section 3.2.1.
    """
    _checks.check_window(window, sinks)
    tensors = {"query": ops.convert_to_tensor(query), "key": ops.convert_to_tensor(key)}
    _checks.check_shapes(tensors, {"query": "bthc", "key": "btgc"})
    query, key = (ops.cast(x, "float32") for x in tensors.values())
    check_heads(query, key)
    key = repeated(key, query.shape[2] // key.shape[2], axis=2)
    scores = ops.einsum("bthc,bshc->bhts", query, key) / query.shape[3] ** 0.5
    places = ops.arange(ops.shape(query)[1], dtype="int32")
    distance = places[:, None] - places[None, :]
    if causal:
        scores = ops.where(distance >= 0, scores, -np.inf)
    if window is not None:
        near = ops.logical_or(ops.abs(distance) < window, (places < sinks)[None, :])
        scores = ops.where(near, scores, -np.inf)
    return ops.softmax(scores, axis=-1)


def check_heads(query, key):
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            "The number of query heads must be a multiple of the number of key-value heads. Received: "
            f"{query.shape[2]} and {key.shape[2]}. Repeat or drop heads."
        )

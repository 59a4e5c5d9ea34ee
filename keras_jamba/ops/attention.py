"""Attention with fewer key-value heads than query heads."""

from keras import ops


def grouped_query_attention(query, key, value, causal):
    """Scaled dot-product attention; query head i reads key-value head `i // (h / g)`.

    Args:
        query: `(b, t, h, c)`.
        key, value: `(b, t, g, c)`, h a multiple of g.
        causal: whether a token sees only itself and the tokens before it.

    Returns:
        `(b, t, h, c)`.

    Reference:
        [Ainslie et al. (2023)](https://arxiv.org/abs/2305.13245).
    """
    if key.shape[2] == 1:
        # keras.ops.dot_product_attention repeats a single key-value head wrongly on TensorFlow.
        key, value = (ops.repeat(x, query.shape[2], axis=2) for x in (key, value))
    return ops.dot_product_attention(query, key, value, is_causal=causal)

"""Explanations of a `DHCJamba`: each function computes a NumPy array, and its `draw_` function draws it.

The model runs in inference mode. Its weights, statistics and seeds stay unchanged. Drawing needs matplotlib,
`pip install 'keras-jamba[visualize]'`. A `draw_` function returns a `matplotlib.figure.Figure`, and writes it with
`file=`.
"""

from keras_jamba.visualize.importance import (
    draw_frame_importance,
    draw_occlusion,
    draw_saliency,
    frame_importance,
    occlusion,
    saliency,
)
from keras_jamba.visualize.reach import (
    attention_maps,
    draw_attention,
    draw_attention_matrices,
    draw_receptive_field,
    receptive_field,
)
from keras_jamba.visualize.tokens import draw_token_order, token_order

__all__ = [
    "attention_maps",
    "draw_attention",
    "draw_attention_matrices",
    "draw_frame_importance",
    "draw_occlusion",
    "draw_receptive_field",
    "draw_saliency",
    "draw_token_order",
    "frame_importance",
    "occlusion",
    "receptive_field",
    "saliency",
    "token_order",
]

"""What a `DHCJamba` looks at: each function computes a NumPy array, and its `draw_` makes a picture of it.

A model is called as in inference, and nothing of it changes: neither weights nor statistics nor seeds. Pictures need
matplotlib, `pip install 'keras-jamba[visualize]'`; a `draw_` returns a `matplotlib.figure.Figure`, and with `file=`
writes it too.
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

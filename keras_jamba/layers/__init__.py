"""Keras layers of the Jamba architecture."""

from keras_jamba.layers.attention import AttentionLayer
from keras_jamba.layers.block import JambaBlock
from keras_jamba.layers.feed_forward import FeedForward
from keras_jamba.layers.mamba import MambaLayer
from keras_jamba.layers.moe import MoELayer
from keras_jamba.layers.router import Router
from keras_jamba.layers.spatial_encoder import SpatialEncoder
from keras_jamba.layers.states import detach_state

__all__ = [
    "AttentionLayer",
    "FeedForward",
    "JambaBlock",
    "MambaLayer",
    "MoELayer",
    "Router",
    "SpatialEncoder",
    "detach_state",
]

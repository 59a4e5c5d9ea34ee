"""Keras layers of the Jamba architecture."""

from keras_jamba.layers.attention import AttentionLayer
from keras_jamba.layers.block import JambaBlock
from keras_jamba.layers.feed_forward import FeedForward
from keras_jamba.layers.gated_conv import GatedConvLayer
from keras_jamba.layers.lora import enable_lora, merge_lora
from keras_jamba.layers.mamba import MambaLayer
from keras_jamba.layers.moe import MoELayer
from keras_jamba.layers.quantization import quantize
from keras_jamba.layers.router import Router
from keras_jamba.layers.states import detach_state
from keras_jamba.layers.vision.patch_encoder import PatchEncoder
from keras_jamba.layers.vision.readout import LastReadout, MeanReadout, SequencePooling
from keras_jamba.layers.vision.residual_encoder import ResidualEncoder
from keras_jamba.layers.vision.spatial_encoder import SpatialEncoder
from keras_jamba.layers.vision.tokens import FrameTokens, GridTokens

__all__ = [
    "AttentionLayer",
    "FeedForward",
    "FrameTokens",
    "GatedConvLayer",
    "GridTokens",
    "JambaBlock",
    "LastReadout",
    "MambaLayer",
    "MeanReadout",
    "MoELayer",
    "PatchEncoder",
    "ResidualEncoder",
    "Router",
    "SequencePooling",
    "SpatialEncoder",
    "detach_state",
    "enable_lora",
    "merge_lora",
    "quantize",
]

"""Keras models of the Jamba architecture."""

from keras_jamba.models.dhc_jamba import DHCJamba
from keras_jamba.models.jamba_backbone import JambaBackbone

__all__ = ["DHCJamba", "JambaBackbone"]

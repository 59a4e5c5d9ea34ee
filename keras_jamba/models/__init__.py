"""Keras models of the Jamba architecture."""

from keras_jamba.models.dhc_jamba import DHCJamba
from keras_jamba.models.jamba_backbone import JambaBackbone
from keras_jamba.models.jamba_causal_lm import JambaCausalLM
from keras_jamba.models.jamba_classifier import JambaClassifier

__all__ = ["DHCJamba", "JambaBackbone", "JambaCausalLM", "JambaClassifier"]

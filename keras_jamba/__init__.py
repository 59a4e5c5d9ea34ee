"""Jamba for Keras 3: Mamba, attention and mixture-of-experts layers and models on JAX, TensorFlow and PyTorch."""

from keras_jamba import _keras  # noqa: F401

# isort: split
from keras_jamba import estimation, exporting, generation, layers, models, ops, presets, tokenizers, training, visualize
from keras_jamba.exporting import export
from keras_jamba.generation import Sampler
from keras_jamba.models import DHCJamba, JambaBackbone, JambaCausalLM, JambaClassifier

__version__ = "0.1.0.dev0"

__all__ = [
    "DHCJamba",
    "JambaBackbone",
    "JambaCausalLM",
    "JambaClassifier",
    "Sampler",
    "estimation",
    "export",
    "exporting",
    "generation",
    "layers",
    "models",
    "ops",
    "presets",
    "tokenizers",
    "training",
    "visualize",
]

"""Jamba for Keras 3: Mamba, attention and mixture-of-experts layers and models on JAX, TensorFlow and PyTorch."""

__version__ = "0.1.0"

"""Choosing tokens one after the other."""

from keras_jamba.generation.samplers import Sampler

__all__ = ["Sampler"]

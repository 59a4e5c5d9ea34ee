"""Text generation: samplers, and assistants for speculative decoding."""

from keras_jamba.generation.assistants import Assistant, DraftModel, PromptLookup
from keras_jamba.generation.prompt_state import PromptState
from keras_jamba.generation.samplers import BeamSampler, Sampler

__all__ = ["Assistant", "BeamSampler", "DraftModel", "PromptLookup", "PromptState", "Sampler"]

"""The entries of a model's config besides the constructor arguments."""

import keras

from keras_jamba import _backend
from keras_jamba.generation.samplers import ProbabilitySampler, sampler_of
from keras_jamba.layers._lora_weights import adaptable_layers, adapted_layers
from keras_jamba.layers._trainable import apply_trainable_state, trainable_state

_STATE = ("adapters", "trainable_state", "sampler", "compiled_on")


def state_of(model, jit_compile):
    """Returns the non-empty entries among adapters, frozen layers and variables, sampler and compiled backend.

    Args:
        model: a `JambaModel`.
        jit_compile: the argument of `compile`.
    """
    found = {
        "adapters": {path: [layer.lora_rank, layer.lora_alpha] for path, layer in adapted_layers(model)},
        "trainable_state": trainable_state(model),
        "sampler": serialized_sampler(getattr(model, "sampler", None)),
        "compiled_on": _backend.name if model.compiled and jit_compile != "auto" else None,
    }
    return {kind: value for kind, value in found.items() if value}


def split_state(config):
    """Returns `(constructor arguments, state)` of a config."""
    state = {kind: config[kind] for kind in _STATE if kind in config}
    return {name: value for name, value in config.items() if name not in state}, state


def apply_state(model, state):
    """Gives a new model the adapters, frozen layers and variables, and sampler of `state_of`."""
    layers = dict(adaptable_layers(model)) if "adapters" in state else {}
    for path, (rank, lora_alpha) in state.get("adapters", {}).items():
        layers[path].enable_lora(rank, lora_alpha)
    if "trainable_state" in state:
        apply_trainable_state(model, state["trainable_state"])
    if "sampler" in state:
        model.sampler = sampler_of(keras.saving.deserialize_keras_object(state["sampler"]))


def is_this_backend(name):
    """Returns whether `name`, as saved in a file, is the running backend."""
    return name == _backend.name


def serialized_sampler(sampler):
    """Returns a sampler as plain data; None and strings are returned as they are.

    Raises:
        ValueError: for a sampler without a config.
    """
    if sampler is None or isinstance(sampler, str):
        return sampler
    inner = sampler.sampler if isinstance(sampler, ProbabilitySampler) else sampler
    if not hasattr(inner, "get_config"):
        raise ValueError(
            "A sampler is saved by its get_config. Received: a model whose sampler is a "
            f"{type(inner).__name__} without one. Add get_config and from_config to it and register it by "
            "keras.saving.register_keras_serializable, or compile the model with another sampler and pass this one to "
            "generate."
        )
    return keras.saving.serialize_keras_object(inner)

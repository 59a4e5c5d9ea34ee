"""Masks that Keras attaches to tensors."""

from keras_jamba._keras_internals import get_keras_mask, set_keras_mask


def mask_of(inputs, mask):
    """Returns `mask`, or without it the mask that Keras attached to the inputs.

    Keras fills in the argument `mask` of a `call` only if no other argument is a tensor. With segment ids or a state
    the mask would be lost.
    """
    return get_keras_mask(inputs) if mask is None else mask


def with_mask(outputs, mask):
    """Attaches `mask` to `outputs` as Keras does, so that losses and metrics ignore padding; returns `outputs`."""
    if mask is not None:
        set_keras_mask(outputs, mask)
    return outputs

"""Keras' masks."""

from keras_jamba._keras_internals import get_keras_mask, set_keras_mask


def mask_of(inputs, mask):
    """`mask`, or the one that Keras attached to the inputs.

    Keras fills in the argument `mask` of a `call` only where the inputs are the one tensor among its
    arguments: beside segment ids or a state it would be lost.
    """
    return get_keras_mask(inputs) if mask is None else mask


def with_mask(outputs, mask):
    """`outputs`, with `mask` attached as Keras does to what a layer returns: losses and metrics leave padding out."""
    if mask is not None:
        set_keras_mask(outputs, mask)
    return outputs

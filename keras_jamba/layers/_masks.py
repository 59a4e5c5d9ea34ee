"""Keras' masks."""


def mask_of(inputs, mask):
    """`mask`, or the one that Keras attached to the inputs.

    Keras fills in the argument `mask` of a `call` only where the inputs are the one tensor among its
    arguments: beside segment ids or a state it would be lost.
    """
    return getattr(inputs, "_keras_mask", None) if mask is None else mask

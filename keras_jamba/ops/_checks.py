"""Checks that ops and layers share. Every message gives the rule, what was received, and the remedy."""

import numbers

from keras import backend


def check_shapes(tensors, letters):
    """Every tensor has the axes that its letters name, and equal letters are equal in size.

    Sizes that are unknown while a graph is traced fit everything.
    """
    sizes = {}
    for name, x in tensors.items():
        shape, axes = tuple(x.shape), letters[name]
        fits = len(shape) == len(axes)
        for axis, size in zip(axes, shape, strict=False):
            if size is not None:
                fits = fits and sizes.setdefault(axis, size) == size
        if not fits:
            known = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
            raise ValueError(
                f"{name} must have the shape ({', '.join(axes)}) with {known}, the sizes of the tensors before it. "
                f"Received: {name}.shape={shape}. Check the order of the axes and which tensor is passed where."
            )


def check_floating(tensors):
    for name, x in tensors.items():
        dtype = backend.standardize_dtype(x.dtype)
        if not backend.is_float_dtype(dtype):
            raise ValueError(
                f"{name} must be a floating-point tensor. Received: {name}.dtype={dtype}. "
                f"Convert it first, for example keras.ops.cast({name}, 'float32')."
            )


def check_integer(name, value, at_least=1):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
        raise ValueError(
            f"{name} must be an integer of at least {at_least}. Received: {name}={value!r}. "
            f"Pass a value such as {name}={max(at_least, 1)}."
        )


def check_number(name, value, low, high=float("inf")):
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high
    if not good:
        raise ValueError(
            f"{name} must be a number from {low} to {high}. Received: {name}={value!r}. Pass a value in that range."
        )


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}. Received: {name}={value!r}. Pass one of these.")


def check_last_axis(layer, shape, size):
    """The input of `layer` is (b, t, size)."""
    if len(shape) != 3 or shape[-1] != size:
        raise ValueError(
            f"The input of {layer} must have the shape (b, t, {size}). Received: shape={tuple(shape)}. "
            f"Reshape the input, or build the layer with another d_model."
        )

"""The images that `DHCJamba` accepts: shape, dtype and pixel values."""

import contextlib
import contextvars
import logging
import numbers

import keras
import numpy as np

from keras_jamba.ops import _checks

# Axes of the inputs without the batch axis, per kind of tokens.
AXES = {"grid": "HWC", "frames": "THWC", "grid+frames": "THWC"}
PIXEL_RANGES = ((0, 1), (0, 255))
# Augmentation may exceed the range by a tenth of its width; 1e-6 covers rounding.
_MARGIN = 0.1 + 1e-6

_checks_values = contextvars.ContextVar("keras_jamba_checks_pixel_values", default=True)
_logger = logging.getLogger("keras_jamba")


@contextlib.contextmanager
def unchecked_values():
    """Disables the check of pixel values inside a context, for images that are modified on purpose."""
    token = _checks_values.set(False)
    try:
        yield
    finally:
        _checks_values.reset(token)


def values_are_checked():
    """Returns whether calls check pixel values."""
    return _checks_values.get()


def checked_image_shape(image_shape, tokens):
    """Returns the argument `image_shape` of `DHCJamba` as a tuple.

    Raises:
        ValueError: for a shape that does not fit `tokens`, or that has its channels first.
    """
    shape = tuple(image_shape) if isinstance(image_shape, (tuple, list)) else (image_shape,)
    axes = AXES[tokens]
    valid = len(shape) == len(axes) and shape[-1] is not None
    valid = valid and all(s is None or (isinstance(s, numbers.Integral) and s > 0) for s in shape)
    if valid and not any(isinstance(s, bool) for s in shape):
        shape = tuple(s if s is None else int(s) for s in shape)
        _check_channels_last(shape)
        return shape
    if len(shape) in (3, 4) and len(shape) != len(axes):
        remedy = "tokens='frames' or 'grid+frames' for clips" if len(shape) == 4 else "tokens='grid' for images"
    else:
        remedy = "for example (32, 32, 3), or (16, 32, 32, 3) for clips of 16 frames"
    raise ValueError(
        f"With tokens={tokens!r} image_shape must be ({', '.join(axes)}), positive integers, where all but C may be "
        f"None. Received: image_shape={image_shape!r}. Pass {remedy}."
    )


def _check_channels_last(shape):
    """Raises ValueError for (C, H, W), and for clips for (T, C, H, W) and (C, T, H, W)."""
    *frames, height, width, channels = shape
    if width is None or min(width, channels) <= 16:
        return
    if height in (1, 3, 4):
        likely, axis = (*frames, width, channels, height), "H"
    elif frames and frames[0] in (1, 3, 4) and width == channels:
        likely, axis = (height, width, channels, frames[0]), "T"
    else:
        return
    raise ValueError(
        f"image_shape must have the channels on the last axis. Received: image_shape={shape}, with {channels} channels "
        f"and {axis}={shape['TH'.index(axis) if frames else 0]}, which looks like channels first. Pass {likely} and "
        f"move the axis of the images with numpy.moveaxis. If the shape is correct, pass None for {axis}."
    )


def checked_pixel_range(pixel_range):
    """Returns the argument `pixel_range` of `DHCJamba` as a tuple of integers, or None.

    Raises:
        ValueError: for another range.
    """
    if pixel_range is None:
        return None
    if isinstance(pixel_range, (tuple, list)):
        are_numbers = all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in pixel_range)
        if are_numbers and tuple(pixel_range) in PIXEL_RANGES:
            return tuple(int(x) for x in pixel_range)
    raise ValueError(
        f"pixel_range must be (0, 1), (0, 255) or None. Received: pixel_range={pixel_range!r}. Scale the images to one "
        "of the two ranges, or pass None for pixel values that are not checked."
    )


def check_shape_and_dtype(images, expected, axes, pixel_range):
    """Checks that `images` is one floating-point tensor `(b, *expected)`; `pixel_range=(0, 255)` allows integers.

    Raises:
        ValueError: for another shape or dtype.
    """
    shape = tuple(getattr(images, "shape", ()))
    if not _fits(shape, expected):
        letters = ", ".join(axes)
        first = (*shape[:-3], *shape[-2:], *shape[-3:-2])
        if _fits(first, expected):
            remedy = "Move the channels to the last axis: numpy.moveaxis(images, -3, -1)."
        else:
            remedy = "Resize the images, add the axis that is missing, or build the model with another image_shape."
        raise ValueError(
            f"images must be one tensor of shape (b, {letters}) with ({letters}) = {expected}. "
            f"Received: shape={shape}, {type(images).__name__}. {remedy}"
        )
    try:
        dtype = keras.backend.standardize_dtype(images.dtype)
        is_float, is_integer = keras.backend.is_float_dtype(dtype), keras.backend.is_int_dtype(dtype)
    except ValueError:  # for example text
        dtype, is_float, is_integer = images.dtype, False, False
    if is_float or (is_integer and pixel_range == (0, 255)):
        return
    if is_integer:
        remedy = "Divide the images by 255, or build the model with pixel_range=(0, 255), which takes integers"
    else:
        remedy = "Convert the images, for example with images.astype('float32')"
    raise ValueError(
        f"With pixel_range={pixel_range} images must be a floating-point tensor. Received: images.dtype={dtype}. "
        f"{remedy}."
    )


def _fits(shape, expected):
    """Returns whether `shape` is `(b, *expected)`; None fits every size."""
    pairs = zip(shape[1:], expected, strict=False)
    return len(shape) == 1 + len(expected) and all(a is None or b is None or a == b for a, b in pairs)


def check_values(images, pixel_range):
    """Checks that the pixel values lie in `pixel_range`, if the host can read them.

    Returns:
        Whether the values look scaled to (0, 1) although the range is (0, 255).

    Raises:
        ValueError: for values out of range or not finite.
    """
    values = None if pixel_range is None else _checks.host_array(images)
    if values is None or values.size == 0 or values.dtype == "uint8":
        return False
    low, high = float(values.min()), float(values.max())
    margin = _MARGIN * (pixel_range[1] - pixel_range[0])
    # Comparisons with NaN are false.
    if pixel_range[0] - margin <= low and high <= pixel_range[1] + margin:
        is_scaled = pixel_range == (0, 255) and 0 <= low and high <= 1
        return bool(is_scaled and values.dtype.kind not in "iu" and np.any(values != np.floor(values)))
    if not (np.isfinite(low) and np.isfinite(high)):
        remedy = "Remove the images with values that are not finite"
    elif pixel_range == (0, 1) and low >= 0 and 2 < high <= 255:
        remedy = "Divide the images by 255, or build the model with pixel_range=(0, 255)"
    else:
        remedy = "Scale the images, or build the model with pixel_range=None, which does not check values"
    raise ValueError(
        f"With pixel_range={pixel_range} pixel values must be finite, from {pixel_range[0]} to {pixel_range[1]}, give "
        f"or take a tenth of the width. Received: values from {low:g} to {high:g}. {remedy}."
    )


def warn_of_scaled_images(pixel_range):
    """Logs a warning that the images look scaled to (0, 1) already."""
    _logger.warning(
        "Images with fractional values from 0 to 1 were passed to a model with pixel_range=%s, which divides them by "
        "255 again. Pass values from 0 to 255, or build the model with pixel_range=(0, 1).",
        pixel_range,
    )

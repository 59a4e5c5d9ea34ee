"""Checks of models and images, and calls of a model that leave it unchanged."""

import keras
import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.models import DHCJamba
from keras_jamba.models._images import unchecked_values
from keras_jamba.ops import _checks


def checked_images(model, images):
    """Checks model and images, and returns the images as a float32 NumPy array."""
    if not isinstance(model, DHCJamba):
        raise ValueError(
            f"model must be a keras_jamba.DHCJamba. Received: {type(model).__name__}. "
            "Pass the model itself, not its backbone or a wrapper."
        )
    if not isinstance(images, np.ndarray):
        images = ops.convert_to_numpy(images)
    model.check_images(images)
    if not len(images):
        raise ValueError(f"There must be at least one image. Received: shape={images.shape}. Pass one or more.")
    return images.astype("float32")


def frames_of(model, images):
    """Returns images as clips `(b, T, H, W, C)` with values from 0 to 1 for drawing. An image is a one-frame clip."""
    images = images if images.ndim == 5 else images[:, None]
    if model.pixel_range == (0, 255):
        return images / 255
    if model.pixel_range is None and images.size:
        low, high = images.min(), images.max()
        return (images - low) / (high - low or 1)
    return images


def pure(model, function):
    """Returns `function` as a compiled function of NumPy arrays that drops all assignments to the model's variables."""
    variables = model.variables

    @_backend.compilation.jit
    def run(values, arrays):
        # Noise and fill colours may leave the range of pixel values.
        with unchecked_values(), keras.StatelessScope(list(zip(variables, values, strict=True))):
            return function(*arrays)

    def call(*arrays):
        outputs = run([v.value for v in variables], [ops.convert_to_tensor(x) for x in arrays])
        return keras.tree.map_structure(ops.convert_to_numpy, outputs)

    return call


def in_batches(function, part, count, batch_size):
    """Calls `function(*part(indices))` on batches of indices 0 to count - 1, and concatenates the results."""
    _checks.check_integer("batch_size", batch_size)
    size, results = min(batch_size, count), []
    for begin in range(0, count, size):
        # Fills up the last batch: another shape would compile again.
        results.append(function(*part(np.minimum(np.arange(begin, begin + size), count - 1))))
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts)[:count], *results)


def logits_of(model, images, batch_size):
    """Returns the logits `(b, num_classes)`."""
    call = pure(model, lambda x: model(x, training=False))
    return in_batches(call, lambda i: (images[i],), len(images), batch_size)


def checked_classes(model, images, classes, batch_size):
    """Returns classes `(b,)` int32: the predicted ones for None, one for all images, or one per image."""
    count = model.get_config()["num_classes"]
    if classes is None:
        return logits_of(model, images, batch_size).argmax(axis=-1).astype("int32")
    values = np.asarray(classes)
    good = values.dtype.kind in "iu" and values.shape in ((), (len(images),))
    if not (good and (values >= 0).all() and (values < count).all()):
        raise ValueError(
            f"classes must be None, an integer from 0 to {count - 1}, or one for each of the {len(images)} images. "
            f"Received: classes={classes!r}. None takes the predicted classes."
        )
    return np.broadcast_to(values, (len(images),)).astype("int32")

"""What all pictures need of a model, which stays as it is."""

import keras
import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.models import DHCJamba
from keras_jamba.models._images import unchecked_values
from keras_jamba.ops import _checks


def checked_images(model, images):
    """`images` as a float32 NumPy array, if the model takes them and there are any."""
    if not isinstance(model, DHCJamba):
        raise ValueError(
            f"model must be a keras_jamba.DHCJamba. Received: {type(model).__name__}. "
            "Pass the model itself, not its backbone or what it was wrapped in."
        )
    if not isinstance(images, np.ndarray):
        images = ops.convert_to_numpy(images)
    model.check_images(images)
    if not len(images):
        raise ValueError(f"There must be at least one image. Received: shape={images.shape}. Pass some.")
    return images.astype("float32")


def frames_of(model, images):
    """`(b, T, H, W, C)` with values from 0 to 1, to be drawn: an image is a clip of one frame."""
    images = images if images.ndim == 5 else images[:, None]
    if model.pixel_range == (0, 255):
        return images / 255
    if model.pixel_range is None and images.size:
        low, high = images.min(), images.max()
        return (images - low) / (high - low or 1)
    return images


def pure(model, function):
    """`function`, tensors to a structure of tensors, on NumPy arrays; what layers assign in it is dropped."""
    variables = model.variables

    @_backend.compilation.jit
    def run(values, arrays):
        # Noise and windows leave the range of pixel values.
        with unchecked_values(), keras.StatelessScope(list(zip(variables, values, strict=True))):
            return function(*arrays)

    def call(*arrays):
        outputs = run([v.value for v in variables], [ops.convert_to_tensor(x) for x in arrays])
        return keras.tree.map_structure(ops.convert_to_numpy, outputs)

    return call


def in_batches(function, part, count, batch_size):
    """`function(*part(index))` for indices 0 to count - 1, so many at a time, put together along the first axis."""
    _checks.check_integer("batch_size", batch_size)
    size, results = min(batch_size, count), []
    for begin in range(0, count, size):
        # The last batch is filled up: another shape would be compiled anew.
        results.append(function(*part(np.minimum(np.arange(begin, begin + size), count - 1))))
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts)[:count], *results)


def logits_of(model, images, batch_size):
    """`(b, num_classes)`."""
    call = pure(model, lambda x: model(x, training=False))
    return in_batches(call, lambda i: (images[i],), len(images), batch_size)


def checked_classes(model, images, classes, batch_size):
    """`(b,)` int32: the predicted classes for None, one for all, or one for each."""
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

"""Repetition of slices, also where PyTorch only infers shapes."""

from keras import ops


def repeated(x, count, axis=0):
    """Returns `x` with each slice along `axis` repeated `count` times, an integer.

    `ops.repeat` fails where Keras infers shapes on PyTorch's meta device. Keras would then run the complete model.
    """
    axis %= len(x.shape)
    before, (size, *after) = ops.shape(x)[:axis], ops.shape(x)[axis:]
    wide = ops.broadcast_to(ops.expand_dims(x, axis + 1), (*before, size, count, *after))
    return ops.reshape(wide, (*before, size * count, *after))

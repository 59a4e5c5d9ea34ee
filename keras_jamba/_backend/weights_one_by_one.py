"""What an optimizer does to all weights, where a compiler takes a step as a whole."""

from keras import ops

adamw = Counter = None


def norm(tensors):
    squares = [ops.sum(ops.square(ops.cast(x, "float32"))) for x in tensors]
    return ops.sqrt(ops.sum(ops.stack(squares)))


def scaled(tensors, factor):
    return [x if x is None else ops.multiply(x, ops.cast(factor, x.dtype)) for x in tensors]

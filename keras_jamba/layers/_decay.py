"""Weight decay per variable: it applies to matrices, not to biases, scales or arguments of exponentials."""

# The names of matrices in Keras' layers. Biases, scales and statistics have other names.
_MATRICES_OF_KERAS = ("kernel", "embeddings")


def without_decay(variable):
    """Marks a new variable as exempt from weight decay and returns it."""
    variable.decays = False
    return variable


def with_decay(variable):
    """Marks a matrix whose name is not one of Keras' for weight decay and returns it."""
    variable.decays = True
    return variable


def decays(variable):
    """Returns whether weight decay applies to a variable: by its mark, or without a mark by its name in Keras."""
    mark = getattr(variable, "decays", None)
    return variable.name in _MATRICES_OF_KERAS if mark is None else mark

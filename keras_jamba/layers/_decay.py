"""Which weights an optimizer may shrink: matrices, and nothing that acts alone or through an exponential."""

# Keras' own names for what its layers multiply by. Biases, scales and statistics have others.
_MATRICES_OF_KERAS = ("kernel", "embeddings")


def without_decay(variable):
    """Marks a weight, where it is made, as one that no weight decay may touch; returns it."""
    variable.decays = False
    return variable


def with_decay(variable):
    """Marks a weight whose name does not say that it is a matrix as one that weight decay is for; returns it."""
    variable.decays = True
    return variable


def decays(variable):
    """Whether weight decay is for this variable: its mark, or where it has none the name that Keras' layers give."""
    mark = getattr(variable, "decays", None)
    return variable.name in _MATRICES_OF_KERAS if mark is None else mark

"""What is common to the states of all layers: plain nested dicts of tensors."""

import keras

from keras_jamba.ops._tokens import NO_DOCUMENT


def empty_state(specs):
    """The state before the first token: zeros, and no document."""
    fill = {"document": NO_DOCUMENT}
    return {name: keras.ops.full(spec.shape, fill.get(name, 0), spec.dtype) for name, spec in specs.items()}


def detach_state(state):
    """The same state, through which no gradient flows: for truncated backpropagation through time.

    Args:
        state: what a layer or a model returned with `return_state=True`, or a cache: nested dicts of tensors.

    Returns:
        The same structure and values. Gradients end here: what came before costs no memory any more.

    Example:
        >>> from keras_jamba.layers import MambaLayer, detach_state
        >>> layer = MambaLayer(8)
        >>> first, state = layer(keras.random.normal((2, 5, 8)), return_state=True)
        >>> second = layer(keras.random.normal((2, 5, 8)), initial_state=detach_state(state))

    Reference:
        [Williams and Peng (1990)](https://doi.org/10.1162/neco.1990.2.4.490).
    """
    return keras.tree.map_structure(keras.ops.stop_gradient, state)

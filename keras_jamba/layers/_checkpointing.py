"""Layers whose insides are computed again for the gradient, instead of being kept."""

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._keras_internals import autocast


def checkpointed(layer, inputs, return_state=False, return_routing=False, **given):
    """What `layer` gives in training, of which only inputs and outputs are kept.

    `keras.remat` alone would leak tracers of losses and of assigned variables on JAX, and draw another dropout
    the second time on TensorFlow and PyTorch. Hence a pure function of inputs and variables: what the layer
    assigns and adds to the losses are outputs, which are assigned and added once.

    Args:
        layer: a built layer.
        return_state, return_routing: its call arguments.
        given: its other call arguments: tensors, nested dicts of tensors, or None.
    """
    flags = dict(return_state=return_state, return_routing=return_routing, training=True)
    variables = layer.non_trainable_variables
    # Copies: the variables themselves are assigned to before the gradient is taken.
    # As they are stored: in mixed precision a copy of each in the compute dtype would be kept.
    with autocast(None):
        state = [ops.copy(ops.convert_to_tensor(v)) for v in variables]
        weights = [ops.convert_to_tensor(v) for v in layer.trainable_variables]
    everything = [weights, state, inputs, {name: x for name, x in given.items() if x is not None}]
    structure = []

    def pure(*tensors):
        weights, state, inputs, given = keras.tree.pack_sequence_as(everything, tensors)
        result = layer.stateless_call(weights, state, inputs, return_losses=True, **flags, **given)
        structure[:] = [keras.tree.map_structure(lambda _: 0, result)]
        return tuple(keras.tree.flatten(result))

    results = _backend.autodiff.remat(pure)(*keras.tree.flatten(everything))
    outputs, assigned, losses = keras.tree.pack_sequence_as(structure[0], results)
    for variable, value in zip(variables, assigned, strict=True):
        variable.assign(value)
    for loss in losses:
        layer.add_loss(loss)
    return outputs

"""Gradient checkpointing: the backward pass recomputes the activations of a layer."""

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._keras_internals import autocast, sublayers


def checkpointed(layer, inputs, return_state=False, return_routing=False, **given):
    """Returns the training outputs of `layer`; only its inputs and outputs stay in memory for the backward pass.

    With `keras.remat` alone, JAX would leak tracers of losses and assigned variables. TensorFlow and PyTorch would draw
    another dropout in the recomputation. Therefore a pure function of inputs and variables is rematerialised. Assigned
    values and losses are outputs of it, and are assigned and added once.

    Args:
        layer: a built layer.
        inputs: its first call argument.
        return_state, return_routing: its call arguments.
        given: its other call arguments: tensors, nested dicts of tensors, or None.

    Returns:
        The outputs of the layer.
    """
    flags = dict(return_state=return_state, return_routing=return_routing, training=True)
    variables = layer.non_trainable_variables
    # Copies, because the layer assigns its variables before the backward pass.
    # Without autocast, which would keep another copy of each in the compute dtype.
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

    results = _backend.autodiff.remat(pure, _draws(layer))(*keras.tree.flatten(everything))
    outputs, assigned, losses = keras.tree.pack_sequence_as(structure[0], results)
    for variable, value in zip(variables, assigned, strict=True):
        variable.assign(value)
    for loss in losses:
        layer.add_loss(loss)
    return outputs


def _draws(layer):
    """Returns whether a training call may draw random numbers: a layer inside has a generator, and a rate unless 0."""
    drawing = [each for each in sublayers(layer) if getattr(each, "seed_generator", None) is not None]
    return any(getattr(each, "dropout", 1) or getattr(each, "drop_path", 1) for each in drawing)

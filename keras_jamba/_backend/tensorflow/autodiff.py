"""Gradients on TensorFlow."""

import keras
import tensorflow as tf


def custom_gradient(forward, backward, plain=None):
    # On a CPU Keras runs TensorFlow without XLA; these loops are an order of magnitude slower there.
    forward = tf.function(forward, jit_compile=True, autograph=False)
    backward = tf.function(backward, jit_compile=True, autograph=False)

    @tf.custom_gradient
    def function(*tensors):
        # A tape that follows the inputs would differentiate the compiled loops too, which it cannot.
        outputs, residuals = forward(*map(tf.stop_gradient, tensors))
        return outputs, lambda *gradients: backward(residuals, tf.nest.pack_sequence_as(outputs, gradients))

    # A variable among the inputs would be taken for one that the function has caught.
    return lambda *tensors: function(*map(tf.convert_to_tensor, tensors))


def can_trace_custom_gradient():
    return True


def remat(function):
    # Eagerly, Keras 3.15's gives the weights no gradient.
    if tf.executing_eagerly():
        return function

    def run(*tensors):
        # Masks and ids are no arguments: TensorFlow gives each a gradient of its own dtype, and cannot add booleans.
        tensors = [tf.convert_to_tensor(x) for x in tensors]
        places = [i for i, x in enumerate(tensors) if x.dtype.is_floating]

        def on_floats(*floats):
            given = list(tensors)
            for i, x in zip(places, floats, strict=True):
                given[i] = x
            return function(*given)

        return keras.remat(on_floats)(*(tensors[i] for i in places))

    return run


def input_gradient(function, x):
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        result = function(x)
    return tape.gradient(result, x, unconnected_gradients="zero")

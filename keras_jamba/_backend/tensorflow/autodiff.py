"""Gradients on TensorFlow."""

import keras
import tensorflow as tf


def custom_gradient(forward, backward, plain=None, has_loops=True, once=None):
    if has_loops:
        # On a CPU Keras runs TensorFlow without XLA, where loops are ten times slower.
        forward = tf.function(forward, jit_compile=True, autograph=False)
        backward = tf.function(backward, jit_compile=True, autograph=False)

    @tf.custom_gradient
    def function(*tensors):
        # A tape that watches the inputs cannot differentiate the compiled loops.
        outputs, residuals = forward(*map(tf.stop_gradient, tensors))
        return outputs, lambda *gradients: backward(residuals, tf.nest.pack_sequence_as(outputs, gradients))

    # `tf.custom_gradient` would treat a variable among the inputs as captured.
    return lambda *tensors: function(*map(tf.convert_to_tensor, tensors))


def is_transformed():
    return False


def can_trace_custom_gradient():
    return True


def remat(function, draws):
    # Eager `keras.remat` of Keras 3.15 gives the weights no gradient.
    if tf.executing_eagerly():
        return function

    def run(*tensors):
        # Masks and ids are not arguments: TensorFlow adds gradients in the dtype of each, and cannot add booleans.
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

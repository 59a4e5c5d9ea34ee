"""The first batch of a step of Keras' loops on TensorFlow, whose functions take batches out of iterators themselves."""

import itertools

import keras
import tensorflow as tf


def first_batch(given, look, steps):
    (data,) = given
    if isinstance(data, list):
        look(data[0])
        return given
    first = next(data)
    look(first)
    batches = itertools.chain([first], data)
    if not _is_iterator_of_tensors(data):
        return (batches,)
    # What the function is traced for is an iterator with these specifications. Another kind would be traced anew.
    batches = itertools.islice(batches, steps)
    return (iter(tf.data.Dataset.from_generator(lambda: batches, output_signature=data.element_spec)),)


def _is_iterator_of_tensors(data):
    if not isinstance(data, tf.data.Iterator):
        return False
    kinds = (tf.TensorSpec, tf.RaggedTensorSpec, tf.SparseTensorSpec)
    return all(isinstance(spec, kinds) for spec in tf.nest.flatten(data.element_spec))


def local_batch(data):
    return keras.tree.map_structure(_local, data, none_is_leaf=False)


def _local(x):
    if isinstance(x, tf.experimental.Optional):
        return None
    if isinstance(x, tf.distribute.DistributedValues):
        return tf.concat(x.values, axis=0)
    return x

"""Trainer functions on TensorFlow, where Keras' step functions read batches from iterators."""

import functools
import itertools

import keras
import tensorflow as tf

from keras_jamba._backend.common.trainer import (  # noqa: F401
    Loop,
    can_bypass_layer_call,
    has_call_hooks,
    on_weights_replaced,
    readable_values,
    with_cuda_graph,
)
from keras_jamba._keras_internals import TensorFlowReplicasHook


def runs_step_without_data():
    return True


class TrainerLoops(TensorFlowReplicasHook):
    def _replicas_data(self, iterator):
        # `first_batch` cannot return a batch of replicas to its iterator. This hook can, because no step has started.
        iterator = self._symbolic_build_data(iterator)
        self._this_loop().checked = True
        return iterator


def first_batch(given, check, steps):
    (data,) = given
    if isinstance(data, list):
        check(data[0])
        return given
    first = next(data)
    check(first)
    if not _is_iterator_of_tensors(data):
        return (itertools.chain([first], data),)
    # The same element specs and the same kind of iterator avoid a second trace of the step function. A dataset from a
    # Python generator would also do, but makes all later steps a quarter slower.
    batches = [first, *itertools.islice(data, steps - 1)]
    datasets = [_dataset(batch, data.element_spec) for batch in batches]
    return (iter(functools.reduce(tf.data.Dataset.concatenate, datasets)),)


def _dataset(batch, specs):
    """Returns one batch as a dataset, whose shapes are unknown wherever those of `specs` are."""

    def relaxed(*tensors):
        flat = zip(tf.nest.flatten(tensors), tf.nest.flatten(specs), strict=True)
        return tf.nest.pack_sequence_as(
            specs, [tf.raw_ops.PlaceholderWithDefault(input=x, shape=spec.shape) for x, spec in flat]
        )

    return tf.data.Dataset.from_tensors(batch).map(relaxed)


def _is_iterator_of_tensors(data):
    if not isinstance(data, tf.data.Iterator):
        return False
    return all(isinstance(spec, tf.TensorSpec) for spec in tf.nest.flatten(data.element_spec))


def local_batch(data):
    return keras.tree.map_structure(_local, data, none_is_leaf=False)


def _local(x):
    if isinstance(x, tf.experimental.Optional):
        return None
    if isinstance(x, tf.distribute.DistributedValues):
        return tf.concat(x.values, axis=0)
    return x

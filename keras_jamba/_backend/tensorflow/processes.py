"""Processes and replicas on TensorFlow, which mirrors variables on the devices."""

import tensorflow as tf

from keras_jamba._backend.common.unsplit_variables import assign_from_shards, local_shards  # noqa: F401


def process_index():
    return 0


def process_count():
    return 1


def all_gather_int(number):
    return [number]


def all_reduce_sum(tensors):
    tensors = [tf.convert_to_tensor(x) for x in tensors]
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


class DataParallel:
    shard = (0, 1)

    def __init__(self, devices):
        self._strategy = tf.distribute.MirroredStrategy(devices)
        self.replicas = self._strategy.num_replicas_in_sync
        self._scope = self._strategy.scope()

    def __enter__(self):
        self._scope.__enter__()

    def __exit__(self, *exception):
        return self._scope.__exit__(*exception)

    def prepare(self, model):
        first = model.variables[0].value
        if not isinstance(first, tf.distribute.DistributedValues):
            raise ValueError(
                "The variables of a model must be mirrored when they are made. Received: "
                f"{model.name!r}, made outside. Make it inside of `with DataParallel()`."
            )
        return model

"""Data parallel on TensorFlow: variables that are mirrored on devices."""

import tensorflow as tf


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
                "The variables of a model must be mirrored where they are made. Received: "
                f"{model.name!r}, made outside. Make it inside of `with DataParallel()`."
            )
        return model

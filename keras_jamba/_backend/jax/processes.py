"""Processes and replicas on JAX: one program over arrays that are split among devices."""

import jax
import keras
import numpy as np

from keras_jamba._backend.common.combined_gradients import all_reduce_sum  # noqa: F401


def process_index():
    return jax.process_index()


def process_count():
    return jax.process_count()


def all_gather_int(number):
    if process_count() == 1:
        return [number]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(number)).reshape(-1).tolist()


def local_shards(variable):
    for shard in variable.value.addressable_shards:
        if shard.replica_id == 0:
            # An array caches its copy on the host, and the variable keeps its shards alive. A new array of the same
            # device memory avoids that.
            data = jax.make_array_from_single_device_arrays(shard.data.shape, shard.data.sharding, [shard.data])
            yield tuple(s.start or 0 for s in shard.index), np.asarray(data)


def assign_from_shards(variable, read):
    value, found = variable.value, {}

    def part(index):
        key = tuple((s.start, s.stop) for s in index)
        if key not in found:
            found[key] = read(index).astype(value.dtype, copy=False)
        return found[key]

    variable.assign(jax.make_array_from_callback(value.shape, value.sharding, part))


class DataParallel:
    shard = (0, 1)

    def __init__(self, devices):
        self._distribution = keras.distribution.DataParallel(devices=devices)
        self.replicas = self._distribution.num_model_replicas
        self._scope = self._distribution.scope()

    def __enter__(self):
        self._scope.__enter__()

    def __exit__(self, *exception):
        return self._scope.__exit__(*exception)

    def prepare(self, model):
        return model

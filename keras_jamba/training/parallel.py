"""Data parallel training on the engine that each backend has for it."""

from keras_jamba import _backend


class DataParallel:
    """Every step's batch is shared among replicas of the model; gradients are averaged, weights stay the same.

    On JAX `keras.distribution.DataParallel` over the devices of this process, on TensorFlow
    `tf.distribute.MirroredStrategy`, on PyTorch `DistributedDataParallel` in processes that torchrun starts, one a
    device. Make and compile the model inside; `prepare` it; fit inside.

    On JAX a step is one program over the whole batch. On TensorFlow and PyTorch a replica sees its part alone:
    batch norm, the auxiliary losses of experts and `capacity_factor` are about that part, as everywhere with these
    engines; gradients are clipped as a whole by `JambaAdamW` on all three. The batch must be a multiple of the
    replicas.

    Args:
        devices: names of devices, as `keras.distribution.list_devices()` on JAX and `"GPU:0"` on TensorFlow; None
            for all of a kind. On PyTorch None: torchrun knows.

    Attributes, inside:
        replicas: how many there are.
        shard: `(number of this process, processes)`, for `Batches(..., shard=)`: on PyTorch each process reads its
            part of each batch. `(0, 1)` on the others, where this process feeds all replicas.

    Raises:
        ValueError: on PyTorch, for devices that are named; `prepare`, for a model that is not built or not made inside.
        RuntimeError: on PyTorch, outside of torchrun.

    Example:
        >>> with keras_jamba.training.DataParallel() as parallel:
        ...     model = keras_jamba.DHCJamba.from_preset("small")
        ...     model.compile(keras_jamba.training.optimizer(model, steps=1000), loss)
        ...     batches = keras_jamba.training.Batches((images, labels), batch_size=256, shard=parallel.shard)
        ...     parallel.prepare(model).fit(batches, epochs=2)
    """

    def __init__(self, devices=None):
        self.devices = devices

    def __enter__(self):
        self._engine = _backend.processes.DataParallel(self.devices)
        self.replicas, self.shard = self._engine.replicas, self._engine.shard
        self._engine.__enter__()
        return self

    def __exit__(self, *exception):
        return self._engine.__exit__(*exception)

    def prepare(self, model):
        """The model itself, made ready; on PyTorch its steps go through `DistributedDataParallel` from here on."""
        if not model.built:
            raise ValueError(
                "A model must have its variables before they are shared among replicas. "
                f"Received: {model.name!r}, built=False. Build it, or call it on a batch, first."
            )
        return self._engine.prepare(model)

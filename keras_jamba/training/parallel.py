"""Data parallel training on each backend's own engine."""

from collections.abc import Sequence
from typing import Any, Literal, Self

import keras

from keras_jamba import _backend


class DataParallel:
    """A context that splits each batch over replicas of the model, averages gradients and keeps the weights equal.

    The engines are `keras.distribution.DataParallel` over the devices of this process on JAX,
    `tf.distribute.MirroredStrategy` on TensorFlow, and `DistributedDataParallel` on PyTorch. On PyTorch torchrun starts
    one process per device. Build, compile, `prepare` and fit the model inside the context.

    On JAX a step is one program over the full batch. On TensorFlow and PyTorch a replica sees only its part of the
    batch. Batch norm, the experts' auxiliary losses and `capacity_factor` then apply to that part, as usual with these
    engines. `JambaAdamW` clips the full gradient on all three. The batch size must be a multiple of the replicas. The
    attributes exist inside the context.

    Args:
        devices: device names, as in `keras.distribution.list_devices()` on JAX and `"GPU:0"` on TensorFlow. None uses
            all devices of a kind. Must be None on PyTorch, where torchrun assigns devices.

    Attributes:
        replicas: the number of replicas.
        shard: `(index of this process, number of processes)`, for `Batches(..., shard=)`. On PyTorch each process reads
            its part of each batch. Elsewhere it is `(0, 1)`: this process feeds all replicas.

    Raises:
        ValueError: on PyTorch, if `devices` is given. From `prepare`, if the model is not built or was made outside.
        RuntimeError: on PyTorch, outside of torchrun.

    Example:
        >>> with keras_jamba.training.DataParallel() as parallel:
        ...     model = keras_jamba.DHCJamba.from_preset("small", load_weights=False)
        ...     model.compile(keras_jamba.training.optimizer(model, steps=1000), loss)
        ...     batches = keras_jamba.training.Batches((images, labels), batch_size=256, shard=parallel.shard)
        ...     parallel.prepare(model).fit(batches, epochs=2)
    """

    replicas: int
    shard: tuple[int, int]

    def __init__(self, devices: Sequence[str] | None = None) -> None:
        self.devices = devices

    def __enter__(self) -> Self:
        self._engine = _backend.processes.DataParallel(self.devices)
        self.replicas, self.shard = self._engine.replicas, self._engine.shard
        self._engine.__enter__()
        return self

    def __exit__(self, *exception: Any) -> Literal[False] | None:
        return self._engine.__exit__(*exception)

    def prepare(self, model: keras.Model) -> keras.Model:
        """Prepares and returns the model. On PyTorch its steps then run through `DistributedDataParallel`."""
        if not model.built:
            raise ValueError(
                "A model must have its variables before they are shared among replicas. "
                f"Received: {model.name!r}, built=False. Build it, or call it on a batch, first."
            )
        return self._engine.prepare(model)

"""Meshes, processes and devices."""

from typing import Any, NamedTuple, Protocol


class ActiveMesh(NamedTuple):
    """The axes along which the active distribution splits tensors.

    Attributes:
        mesh: the device mesh.
        batch: name of the mesh axis that splits rows.
        model: name of the mesh axis that splits the model. None if only rows are split.
        sequence: whether the axis `model` splits tokens in tensors whose channels or heads it does not split.
        layouts_at_use: a layout map without the axis `batch`, if that axis also splits matrices. Otherwise None.
    """

    mesh: Any
    batch: str
    model: str | None
    sequence: bool
    layouts_at_use: Any

    def count(self, axis):
        return 1 if axis is None else self.mesh.shape[axis]


class Sharding(Protocol):
    def supports_model_parallel(self):
        """Returns whether a `keras.distribution` may split the weights of a model among devices. JAX: True."""

    def active_mesh(self):
        """Returns the `ActiveMesh` of the active distribution, or None.

        JAX: not None for a `DataParallel`, and for a `ModelParallel` with a `training.layout_map`. None inside
        `shard_map`. TensorFlow and PyTorch: None.

        Raises:
            ValueError: if the distribution splits rows over another axis than the first one of the mesh.
        """

    def why_not_sharded(self, model):
        """Returns None, or the reason why a distribution does not split the weights of `model`. JAX: None."""

    def shard_map(self, function, tensors, split, results):
        """Calls `function(tensors)` on the local shards of a dict of tensors, and returns its tuple of results.

        `split`, by name, and `results` have one tuple per tensor: per axis the mesh axes that split it, or None.
        """

    def with_sharding_constraint(self, x, axes):
        """Returns `x` split over the mesh `axes`."""

    def all_gather_weight(self, variable):
        """Returns a variable as matrix products use it: gathered if devices of the axis `batch` share it.

        TensorFlow and PyTorch: its tensor.
        """

    def sharded_full(self, shape, value, dtype, axes):
        """Returns a tensor filled with `value`, split over the mesh `axes`."""

    def all_to_all(self, x, axis):
        """Sends `x[i]` to device i of a mesh axis, and returns the slices sent to this one. In `shard_map` only."""

    def pmax(self, x, axes):
        """Returns the maximum over all devices of the mesh `axes`. In `shard_map` only."""

    def to_default_device(self, x):
        """Returns a tensor moved from the mesh to the default device. While a program is traced, `x` itself."""

    def to_numpy(self, x):
        """Returns a tensor as a NumPy array. If processes share the tensor, all of them must call this."""


class Processes(Protocol):
    def process_index(self):
        """Returns the index of this process among the training processes. TensorFlow: 0."""

    def process_count(self):
        """Returns the number of training processes. TensorFlow: 1."""

    def all_gather_int(self, number):
        """Returns a list with the 32-bit integer of each process. The processes wait for each other."""

    def local_shards(self, variable):
        """Yields `(start, array)` per shard of a variable that this process has to save.

        `start` is the first index of the shard along each axis. `array` is a NumPy array that no cache keeps alive.
        The shards of all processes make up the variable. If each process has its own variable, it yields one shard.
        """

    def assign_from_shards(self, variable, read):
        """Assigns `read(index)` to the shards of a variable that the devices of this process hold.

        `index` has one slice per axis. `read` returns a NumPy array.
        """

    def all_reduce_sum(self, tensors):
        """Returns sums over all replicas. Must be called inside a step in which each replica has a part of the batch.

        JAX and PyTorch: the tensors themselves, because these backends have already combined the replicas' gradients.
        """

    class DataParallel(Protocol):
        """A context in which a model is trained on several devices, see `training.parallel`.

        Attributes: `replicas`, their number, and `shard`, `(index, count)` of the data that this process reads.
        """

        def __init__(self, devices): ...

        def __enter__(self): ...

        def __exit__(self, *exception): ...

        def prepare(self, model):
            """Returns `model`, whose training steps then run on all replicas."""


class Device(Protocol):
    def device_name(self):
        """Returns the vendor's name of the device of new tensors. "CPU" for a CPU."""

    def device_memory(self):
        """Returns `{"device_memory": bytes, "device_memory_peak": bytes}`, or {} if no accelerator reports them."""

    def start_profiler(self, folder):
        """Starts the backend's profiler, which writes to `folder`. Returns the function that stops it."""

    def is_out_of_memory(self, error):
        """Returns whether an exception reports that memory is exhausted."""

    def get_rng_states(self):
        """Returns the states of the backend's global generators, arrays of bytes. JAX and TensorFlow: []."""

    def set_rng_states(self, states):
        """Restores the result of `get_rng_states`."""

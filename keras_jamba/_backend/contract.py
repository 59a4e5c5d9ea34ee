"""The contract of the backend packages: one Protocol per capability.

Each of the packages `jax`, `tensorflow` and `torch` has one module per Protocol, with its name in lower case.
`tensors.py` has the functions of `Tensors` without `self`. The docstrings here also document the implementations and
state the differences between backends. An unavailable function raises NotImplementedError. The `why_no_...` or
`has_...` function beside it reports this before a call. For the functions of `Sharding`, `active_mesh` does.
"""

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


class Tensors(Protocol):
    def platform(self, x=None):
        """Returns the platform of tensor `x`: "cpu", "gpu" or "tpu".

        The platform of new tensors is returned without `x`, or if the device of `x` is unknown. The device is unknown
        while JAX or TensorFlow traces, and for a meta tensor of PyTorch.
        """

    def concrete_numpy(self, x):
        """Returns the values of a tensor as a NumPy array, or None if reading them would wait for a device.

        Returns None while a graph is traced, on an accelerator, for a JAX array of several processes, and inside
        transforms of `torch.func`. PyTorch returns bfloat16 as float32.
        """

    def needs_static_shapes(self):
        """Returns whether a compiler traces the caller and needs static shapes.

        JAX: always, because eager JAX compiles each operation. TensorFlow: under XLA, not in other graphs.
        PyTorch: inside `torch.compile` and while a decoding step is traced.
        """

    def is_traced_by_torchscript(self):
        """Returns whether TorchScript traces the caller, as `torch.onnx` does, and fixes the sizes of its example."""

    def ensure_shape(self, x, shape):
        """Returns `x`, whose unknown sizes a TensorFlow graph checks against `shape` when it runs.

        None in `shape` matches any size. JAX and PyTorch know all sizes when they trace and check nothing.
        """

    def can_log(self):
        """Returns whether the caller can log a message. PyTorch: not inside `torch.compile`."""

    def why_no_split_rows(self):
        """Returns None, or the reason why `split_rows` is unavailable. JAX: always unavailable."""

    def split_rows(self, x, counts):
        """Splits the rows of `x` into groups of `counts[0]`, `counts[1]`, ... rows."""


class Compilation(Protocol):
    def has_jit(self):
        """Returns whether `jit` compiles, so that fewer input shapes save time. PyTorch: False."""

    def jit(self, function):
        """Returns `function` of nested arrays, compiled once per input shape. PyTorch: `function` itself."""

    def jit_inference(self, function, variables):
        """Returns `function` without gradients. It may read `variables` and must not assign to them.

        JAX and TensorFlow compile once per structure, shape and dtype. PyTorch runs `function` in inference mode and
        does not compile. Each call reads the current values of `variables`; compiled programs do not embed them.
        """

    def compiled_while_loop(self, body, variables):
        """Returns `run(going, state) -> state`, which calls `body(state) -> (going, state)` while `going` is true.

        JAX and TensorFlow compile the complete loop. PyTorch runs the loop in Python and traces the body once per
        structure, shape, dtype and device. PyTorch does not trace a body that reads the value of a tensor.
        """

    def has_fast_dynamic_loop(self):
        """Returns whether a compiled loop is fast if its length depends on values. True for JAX on a CPU only."""

    def scan(self, body, carry, inputs, reverse=False):
        """Loops over the leading axis with the contract of `jax.lax.scan`. Compilers do not unroll the loop.

        `body(carry, slices)` returns `(carry, outputs)`.
        """


class Autodiff(Protocol):
    def custom_gradient(self, forward, backward, plain=None, has_loops=True):
        """Returns a function of tensors with a custom gradient. JAX compiles it, and TensorFlow if it has loops.

        Args:
            forward: `forward(*tensors)` returns `(outputs, residuals)`.
            backward: `backward(residuals, gradients)` returns one gradient per input, None for an integer input.
                `gradients` has the structure of the outputs. On JAX and PyTorch a gradient may be a function without
                arguments, which is called if that gradient is needed.
            plain: `plain(*tensors)` computes the outputs if no gradient is needed. JAX and PyTorch only.
            has_loops: whether the functions have loops. TensorFlow compiles these, once per shape.
        """

    def can_trace_custom_gradient(self):
        """Returns whether the tracer of the caller supports `custom_gradient`. `torch.compile` does not."""

    def remat(self, function):
        """Returns `function` with rematerialization: it keeps inputs and outputs, and the backward pass recomputes it.

        TensorFlow: `function` itself when called eagerly.
        """

    def input_gradient(self, function, x):
        """Returns the gradient of the scalar `function(x)` for tensor `x`. Zeros if it does not depend on `x`.

        PyTorch raises RuntimeError if the result requires no gradient.
        """


class Numerics(Protocol):
    def matmul_in_float32(self, x, y):
        """Multiplies two matrices of one dtype and returns float32.

        JAX and PyTorch on a GPU keep the float32 sums. TensorFlow and PyTorch on a CPU round the sums to the dtype of
        the inputs first.
        """

    def rms_norm(self, x, scale, epsilon):
        """Computes `keras.ops.rms_normalization` over the last axis. PyTorch: with its fused function, or in Triton."""

    def grouped_matmul(self, x, bank, counts, transpose_rhs=False):
        """Multiplies rows by the matrix of their group.

        Args:
            x: `(rows, k)`: the first `counts[0]` rows belong to group 0, the next `counts[1]` to group 1, ...
            bank: `(groups, k, n)`, or `(groups, n, k)` with `transpose_rhs`.
            counts: `(groups,)` int32.

        Returns:
            `(rows, n)`. Not available on TensorFlow.
        """

    def grouped_matmul_weight_grad(self, a, b, counts):
        """Computes the gradient of `grouped_matmul` for the bank, `(groups, k, n)`.

        It is `a.T @ b` for the rows of each group in `a`, `(rows, k)`, and in `b`, `(rows, n)`.
        """

    def why_no_grouped_matmul(self, platform, dtype, sizes):
        """Returns None, or the reason why both are unavailable for these row `sizes`. TensorFlow: always so."""

    def prefers_grouped_matmul(self):
        """Returns whether `grouped_matmul` is faster than the Triton kernels of this package. PyTorch: True."""


class Kernels(Protocol):
    def c_kernel_op(self, kernel, portable):
        """Returns a kernel of `keras_jamba._native` as a differentiable `(tensors, options) -> outputs`.

        Args:
            kernel: a `keras_jamba._native` kernel. Any of its tensors may be None.
            portable: the same function in Keras operations.

        On JAX, a kernel with a backward function takes its second derivatives from `portable`. TensorFlow and PyTorch
        raise RuntimeError for them.
        """

    def why_no_c_kernel(self, shape):
        """Returns None, or the reason why such an op is unavailable for an input of this `shape`."""

    def triton_op(self, program, portable):
        """Returns a program of `keras_jamba._triton` as an op, like `c_kernel_op`. Not available on TensorFlow.

        Creating the op never raises. TensorFlow: calling it raises NotImplementedError. JAX: platforms other than a GPU
        compute `portable`. PyTorch: call `why_no_triton_op` first, because forward-mode derivatives would be zero.
        """

    def why_no_triton_op(self, shape):
        """Returns None, or the reason why such an op is unavailable for an input of this `shape`."""

    def triton_launcher(self):
        """Returns a `keras_jamba._triton.Gpu` for kernels without a gradient. Not available on TensorFlow."""

    def why_no_triton(self):
        """Returns None, or the reason why the result of `triton_launcher` cannot be used."""


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


class Trainer(Protocol):
    class Loop(Protocol):
        """A context for one `fit`, `evaluate`, `predict` or `..._on_batch` of a model in this thread.

        `kind` is the name of that method. The caller sets the attributes `checked` and `has_begun`, initially False.
        JAX: the loop also holds the values of the variables.

        Raises:
            ValueError: on JAX, at its end, if the rows of a batch cannot be split evenly over the mesh.
        """

        def __init__(self, kind): ...

        def __enter__(self): ...

        def __exit__(self, *exception): ...

        def sync(self):
            """Assigns the newest values to the variables."""

    class TrainerLoops(Protocol):
        """A base class before `keras.Model` for models that keep their weights however a loop ends.

        Other threads may read the weights during the loop. The model defines `_this_loop()`, which returns the
        innermost `Loop` of this thread, or None. TensorFlow: the model also defines `_symbolic_build_data(iterator)` of
        `SymbolicBuildHook`, for replicas only. PyTorch: empty, because steps leave the weights in the model.
        """

    def readable_values(self, variables):
        """A context with tensors or variables that hold the values of `variables`, while another thread trains."""

    def first_batch(self, given, check, steps):
        """Calls `check(batch)` with the first batch in `given`, the arguments of Keras' step function.

        Returns arguments with which the step function reads the same batches, at most `steps`.
        """

    def local_batch(self, data):
        """Returns a batch as NumPy arrays or tensors of one device.

        TensorFlow: None for an empty Optional, and one tensor for a value that several replicas share.
        """

    def with_cuda_graph(self, model, step):
        """Returns `step(data)`, Keras' train function of `model`, or a faster equivalent.

        PyTorch on a GPU: the step is captured as a CUDA graph. Elsewhere: `step` itself.
        """

    def on_weights_replaced(self, layer):
        """Must be called after variables of a built layer or of its sublayers have been replaced."""

    def runs_step_without_data(self):
        """Returns whether a `fit` step without data has already changed variables. TensorFlow: True."""

    def can_bypass_layer_call(self, layer, x):
        """Returns whether `layer.call(x)` may replace `layer(x)`. PyTorch only, because it launches op by op."""


class Optimizer(Protocol):
    def global_norm(self, tensors):
        """Returns the float32 norm of all tensors together."""

    def scale_gradients(self, tensors, factor):
        """Returns each tensor times a scalar. None stays None."""

    def has_fused_adamw(self):
        """Returns whether `fused_adamw` and `HostStepCounter` are available. PyTorch: True."""

    def fused_adamw(self, weights, gradients, momentums, velocities, maxima, *, step, rate, betas, epsilon, decay):
        """Applies a step of `keras.optimizers.AdamW`; `maxima` is empty without AMSGrad. PyTorch only."""

    def move_averages(self, pairs, share):
        """Moves each average of `[(average, variable)]` by a share of the distance to its variable. PyTorch only."""

    class HostStepCounter(Protocol):
        """The number of steps, cached on the host. PyTorch only."""

        def __init__(self): ...

        def read(self, variable):
            """Returns an integer variable. It waits for the device only if other code has changed the variable."""

        def keep(self, variable, value):
            """Caches `value` as the current value of `variable`."""


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

"""The contract of the backend packages: one Protocol per capability.

Each of the packages `jax`, `tensorflow` and `torch` has one module per Protocol, named like it in lower case:
`tensors.py` has the functions of `Tensors`, without `self`. Their docstrings are here and nowhere else, as are the
differences between backends. A function that a backend cannot offer raises NotImplementedError. The `why_no_...` or
`has_...` function beside it tells beforehand; for the functions of `Sharding` it is `active_mesh`.
"""

from typing import Any, NamedTuple, Protocol


class ActiveMesh(NamedTuple):
    """How the active distribution splits tensors.

    Attributes:
        mesh: the mesh of devices.
        batch: name of the mesh axis that splits rows.
        model: name of the mesh axis that splits the model; None where only rows are split.
        sequence: whether tokens are split over the axis `model` where their channels or heads are not.
        layouts_at_use: a map of layouts without the axis `batch`, where that axis has parts of matrices too; or None.
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
        """Returns "cpu", "gpu" or "tpu": where tensor `x` lies.

        Without `x` it is where new tensors go. So it is for a tensor whose device is not known: while JAX or
        TensorFlow traces, and for a meta tensor of PyTorch.
        """

    def concrete_numpy(self, x):
        """Returns the values of a tensor as a NumPy array, or None where reading them would wait for a device.

        None while a graph is traced, on an accelerator, for an array of several processes (JAX), and inside transforms
        of `torch.func`. PyTorch returns bfloat16 as float32.
        """

    def needs_static_shapes(self):
        """Returns whether shapes must be static here, because a compiler traces the caller.

        JAX: always, because eager JAX compiles each operation. TensorFlow: under XLA, not in graphs.
        PyTorch: inside `torch.compile` and while a decoding step is traced.
        """

    def is_traced_by_torchscript(self):
        """Returns whether TorchScript traces the caller, as `torch.onnx` does, and keeps the sizes of its example."""

    def ensure_shape(self, x, shape):
        """Returns `x`. TensorFlow: a graph checks the sizes that it does not know yet against `shape` when it runs.

        None in `shape` is any size. JAX and PyTorch know all sizes when they trace, and check nothing here.
        """

    def can_log(self):
        """Returns whether a message can be logged where this is called. PyTorch: not inside `torch.compile`."""

    def why_no_split_rows(self):
        """Returns None, or why `split_rows` cannot run here. JAX: never available."""

    def split_rows(self, x, counts):
        """Splits the rows of `x` into groups of `counts[0]`, `counts[1]`, ... rows."""


class Compilation(Protocol):
    def has_jit(self):
        """Returns whether a compiler takes functions, so that fewer shapes save time. PyTorch: False."""

    def jit(self, function):
        """Returns `function` of nested arrays, compiled once per input shape. PyTorch: `function` itself."""

    def jit_inference(self, function, variables):
        """Returns `function` without gradients. It reads `variables` and assigns none.

        JAX and TensorFlow compile it once per structure, shape and dtype. PyTorch: `function` in inference mode, not
        compiled. The values of `variables` at each call count, and no program contains them.
        """

    def compiled_while_loop(self, body, variables):
        """Returns `run(going, state) -> state`, which calls `body(state) -> (going, state)` while `going` is true.

        JAX and TensorFlow compile the whole loop. PyTorch runs it in Python, and traces the body once per structure,
        shape, dtype and device. A body that needs the value of a tensor runs untraced there.
        """

    def has_fast_dynamic_loop(self):
        """Returns whether a compiled loop is fast though its length depends on values. JAX on a CPU only."""

    def scan(self, body, carry, inputs, reverse=False):
        """A loop over the leading axis that stays a loop when compiled, with the contract of `jax.lax.scan`.

        `body(carry, slices)` returns `(carry, outputs)`.
        """


class Autodiff(Protocol):
    def custom_gradient(self, forward, backward, plain=None):
        """Returns a function of tensors whose gradient is written by hand; compiled, where there is a compiler.

        Args:
            forward: `forward(*tensors)` returns `(outputs, residuals)`.
            backward: `backward(residuals, gradients)` returns one gradient per input, None for an integer one.
                `gradients` has the structure of the outputs. On JAX and PyTorch a gradient may be a function without
                arguments, which is called if that gradient is wanted.
            plain: `plain(*tensors)` computes the outputs where no gradient is wanted. JAX and PyTorch only.
        """

    def can_trace_custom_gradient(self):
        """Returns whether what traces the caller can follow `custom_gradient`. `torch.compile` cannot."""

    def remat(self, function):
        """Returns `function`, which the backward pass computes again. Only its inputs and outputs are kept.

        TensorFlow: `function` itself when called eagerly.
        """

    def input_gradient(self, function, x):
        """Returns the gradient of `function(x)`, a scalar, for tensor `x`. Zeros where it does not depend on `x`.

        PyTorch raises RuntimeError where the result requires no gradient.
        """


class Numerics(Protocol):
    def matmul_in_float32(self, x, y):
        """Multiplies two matrices of one dtype into float32.

        The sums are not rounded to that dtype on JAX, and on PyTorch on a GPU. TensorFlow rounds them, and so does
        PyTorch on a CPU.
        """

    def rms_norm(self, x, scale, epsilon):
        """`keras.ops.rms_normalization` over the last axis. PyTorch: its fused function."""

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
        """The gradient of `grouped_matmul` for the bank, `(groups, k, n)`.

        Per group it is the rows of `a`, `(rows, k)`, transposed, times those of `b`, `(rows, n)`.
        """

    def why_no_grouped_matmul(self, platform, dtype, sizes):
        """Returns None, or why neither of the two can run for rows of these `sizes`. TensorFlow: never available."""

    def prefers_grouped_matmul(self):
        """Returns whether `grouped_matmul` is faster than our kernels in Triton. PyTorch: True."""


class Kernels(Protocol):
    def c_kernel_op(self, kernel, portable):
        """Returns a kernel of `keras_jamba._native` as a differentiable `(tensors, options) -> outputs`.

        Args:
            kernel: a `keras_jamba._native` kernel. Any of its tensors may be None.
            portable: the same function in operations of Keras.

        A kernel with a backward function has second derivatives on JAX only, those of `portable`. TensorFlow and
        PyTorch raise RuntimeError.
        """

    def why_no_c_kernel(self, shape):
        """Returns None, or why such an op cannot be called here for an input of this `shape`."""

    def triton_op(self, program, portable):
        """`c_kernel_op` for a program of `keras_jamba._triton`. Not available on TensorFlow.

        Making the op never raises. TensorFlow: calling it raises NotImplementedError. JAX: platforms other than a GPU
        compute `portable`. PyTorch: ask `why_no_triton_op` first, because forward-mode derivatives would be zero.
        """

    def why_no_triton_op(self, shape):
        """Returns None, or why such an op cannot be called here for an input of this `shape`."""

    def triton_launcher(self):
        """Returns a `keras_jamba._triton.Gpu`, for kernels without a gradient. Not available on TensorFlow."""

    def why_no_triton(self):
        """Returns None, or why what `triton_launcher` returns cannot be used here."""


class Sharding(Protocol):
    def supports_model_parallel(self):
        """Returns whether a `keras.distribution` may split the weights of a model among devices. JAX: True."""

    def active_mesh(self):
        """Returns the `ActiveMesh` of the active distribution, or None.

        JAX: not None for a `ModelParallel` with a `training.layout_map` and for a `DataParallel`; None inside of
        `shard_map`. TensorFlow and PyTorch: None.

        Raises:
            ValueError: if the distribution splits rows over another axis than the first one of the mesh.
        """

    def why_not_sharded(self, model):
        """Returns None, or why a distribution leaves the weights of `model` as they are. JAX: None."""

    def shard_map(self, function, tensors, split, results):
        """Calls `function(tensors)` on each device's part of a dict of tensors, and returns its tuple of results.

        `split`, by name, and `results` have one tuple per tensor: for each axis the mesh axes that split it, or None.
        """

    def with_sharding_constraint(self, x, axes):
        """Returns `x`, split over the mesh `axes` from here on."""

    def all_gather_weight(self, variable):
        """Returns the values of a variable as products use them, gathered where devices of the axis `batch` share it.

        TensorFlow and PyTorch: its tensor.
        """

    def sharded_full(self, shape, value, dtype, axes):
        """Returns a tensor of one number, split over the mesh `axes`."""

    def all_to_all(self, x, axis):
        """Sends `x[i]` to device i of a mesh axis, and returns what each of them has for this one. In `shard_map`."""

    def pmax(self, x, axes):
        """Returns the largest number of all devices of the mesh `axes`. In `shard_map`."""

    def to_default_device(self, x):
        """Returns a tensor that lies on no mesh any more. While a program is traced, `x` itself."""

    def to_numpy(self, x):
        """Returns a tensor as a NumPy array, whichever processes have parts of it. All of them must call it."""


class Processes(Protocol):
    def process_index(self):
        """Returns the number of this process among those that train together. TensorFlow: 0."""

    def process_count(self):
        """Returns how many processes train together. TensorFlow: 1."""

    def all_gather_int(self, number):
        """Returns a list of the 32-bit integers with which all processes call it; they wait for each other."""

    def local_shards(self, variable):
        """Yields `(start, array)` per part of a variable that this process has to save.

        `start` is where the part begins along each axis, `array` a NumPy array that nothing keeps. The parts of all
        processes make up the variable. Where each process has a variable of its own, it yields it whole.
        """

    def assign_from_shards(self, variable, read):
        """Assigns to a variable what `read(index)` returns for the parts that the devices of this process need.

        `index` has a slice per axis, and `read` returns a NumPy array.
        """

    def all_reduce_sum(self, tensors):
        """Returns sums over all replicas, inside a step that they take on parts of a batch.

        JAX and PyTorch: the tensors themselves, because the replicas' gradients are combined already.
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
        """A context around a loop of a model in this thread.

        `kind` is a method of `keras.Model`. The attributes `looked` and `begun`, both False at first, are for whoever
        makes it. JAX: the loop also holds the values of the variables.

        Raises:
            ValueError: on JAX, at its end, if the rows of a batch cannot be split evenly over the mesh.
        """

        def __init__(self, kind): ...

        def __enter__(self): ...

        def __exit__(self, *exception): ...

        def sync(self):
            """Gives the variables the newest values."""

    class TrainerLoops(Protocol):
        """A class before `keras.Model` for models that keep their weights however a loop ends.

        Other threads may read the weights meanwhile. It needs `_this_loop()`: the innermost `Loop` of this thread, or
        None. TensorFlow: it also needs `_symbolic_build_data(iterator)` of `SymbolicBuildHook`, and only replicas use
        it. PyTorch: empty, because steps leave the weights in the model.
        """

    def readable_values(self, variables):
        """A context with tensors or variables that hold the values of `variables`, while another thread trains."""

    def first_batch(self, given, look, steps):
        """Calls `look(batch)` with the first batch in `given`, the arguments of a step function that Keras made.

        Returns arguments with which that function takes the same batches, at most `steps`.
        """

    def local_batch(self, data):
        """Returns a batch as NumPy or tensors of one device.

        TensorFlow: None for an empty Optional, one tensor for what several replicas have parts of.
        """

    def with_cuda_graph(self, model, step):
        """Returns `step(data)`, the train function that Keras made for `model`, or what does the same faster.

        PyTorch on a GPU: the step is captured as a CUDA graph. Elsewhere: `step` itself.
        """

    def on_weights_replaced(self, layer):
        """Must be called when a layer, or one inside, has got other variables after it was built."""

    def runs_step_without_data(self):
        """Returns whether a step of `fit` that finds no data left has changed variables by then. TensorFlow: True."""

    def can_bypass_layer_call(self, layer, x):
        """Returns whether `layer.call(x)` does all that `layer(x)` does. PyTorch only: it launches op by op."""


class Optimizer(Protocol):
    def global_norm(self, tensors):
        """Returns the float32 norm of all tensors together."""

    def scale_gradients(self, tensors, factor):
        """Returns each tensor times a scalar. None stays None."""

    def has_fused_adamw(self):
        """Returns whether `fused_adamw` and `HostStepCounter` are available. PyTorch: True."""

    def fused_adamw(self, weights, gradients, momentums, velocities, maxima, *, step, rate, betas, epsilon, decay):
        """Takes a step of `keras.optimizers.AdamW`, given lists of its variables. `maxima` is empty without AMSGrad.

        PyTorch only. JAX and TensorFlow compile Keras' own step.
        """

    class HostStepCounter(Protocol):
        """The number of steps, known on the host. PyTorch only."""

        def __init__(self): ...

        def read(self, variable):
            """Returns an integer variable. It waits for the device only if something else changed the variable."""

        def keep(self, variable, value):
            """Remembers `value` as what `variable` holds now."""


class Device(Protocol):
    def device_name(self):
        """Returns what its maker calls the device that new tensors go to. "CPU" for a CPU."""

    def device_memory(self):
        """Returns `{"device_memory": bytes, "device_memory_peak": bytes}`; {} where no accelerator reports it."""

    def start_profiler(self, folder):
        """Starts the backend's profiler, which writes to `folder`. Returns the function that stops it."""

    def is_out_of_memory(self, error):
        """Returns whether an exception says that memory ran out."""

    def get_rng_states(self):
        """Returns the states of the backend's global generators, arrays of bytes. JAX and TensorFlow: []."""

    def set_rng_states(self, states):
        """Restores what `get_rng_states` returned."""

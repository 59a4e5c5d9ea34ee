"""Tensors, compiled functions, gradients, numerics and kernels."""

from typing import Protocol


class Tensors(Protocol):
    def as_tensor(self, x):
        """Computes `keras.ops.convert_to_tensor`. PyTorch: a tensor on the default device is returned at once."""

    def top_k(self, x, k):
        """Returns the k largest numbers along the last axis, largest first, and their indices."""

    def argsort(self, x):
        """Returns the int32 indices that sort distinct numbers along the last axis."""

    def take_tokens(self, x, index):
        """Returns the tokens of `x (b, t, ...)` at `index (b, n)`, as `(b, n, ...)`."""

    def is_floating(self, x):
        """Returns whether the dtype of `x` is a floating-point one."""

    def platform(self, x=None):
        """Returns the platform of tensor `x`: "cpu", "gpu" or "tpu".

        The platform of new tensors is returned without `x`, or if the device of `x` is unknown. The device is unknown
        while JAX or TensorFlow traces, and for a meta tensor of PyTorch.
        """

    def has_values(self, x):
        """Returns whether `x` has values, now or when a graph runs. PyTorch: False on the meta device.

        Keras infers shapes on it. Code that reads values fails there, and Keras would then run the complete model.
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

    def fill(self, variable, array):
        """Assigns a NumPy array of any layout and floating-point dtype, with as few copies on the host as possible."""

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

    def block(self, x, index, size, axis):
        """Returns block number `index` of the blocks of `size` along `axis`. `index` may be a tensor."""

    def add_to_block(self, x, update, index, axis):
        """Returns `x` with `update`, a block as of `block`, added to block number `index` along `axis`.

        PyTorch changes `x`. Without gradients, for use inside `custom_gradient`.
        """

    def scatter_update(self, x, index, updates):
        """Computes `keras.ops.scatter_update`. PyTorch: into `x` itself, if a captured loop may overwrite it."""


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

    def compiled_while_loop(self, body, variables, folds=False, overwrites=False):
        """Returns `run(going, state, steps=None) -> state`.

        It calls `body(state) -> (going, state)` while `going` is true. JAX and TensorFlow compile the complete loop.
        PyTorch on a GPU replays the body as a CUDA graph, one per structure, shape, dtype and device. It otherwise
        traces the body once per kind and runs the loop in Python. It neither captures nor traces a body that reads the
        value of a tensor.

        Args:
            body: a function of nested tensors. It reads `variables`, and assigns nothing.
            variables: the Keras variables.
            folds: whether operations that depend only on variables and constants may run once for many steps. PyTorch
                cannot see what kernels of other packages write.
            overwrites: whether `scatter_update` may write into the state that `body` receives.

        `steps` is the number of steps while `going` stays true. With it, a loop may go on for a few steps after `going`
        became false, so that no step waits for the device.
        """

    def has_known_step(self, model):
        """Returns whether `step` of a model and all layers inside the model are those of Keras and this package."""

    def has_fast_dynamic_loop(self):
        """Returns whether a compiled loop is fast if its length depends on values. True for JAX on a CPU only."""

    def use_persistent_cache(self):
        """Lets later compilations of this process read and write a cache on the disk. JAX only.

        Raises:
            ValueError: if KERAS_JAMBA_JAX_CACHE is set to anything but "off".
        """

    def is_exporting(self, shape):
        """Returns whether the caller is traced into a graph for other programs, which cannot assign variables.

        In `keras_jamba.export` always. Elsewhere, JAX: if a size in `shape` is open. PyTorch: in `torch.export` and
        `torch.jit.trace`. TensorFlow: never.
        """

    def needs_portable_operations(self, shape):
        """Returns whether that graph may only use operations that other runtimes have too.

        As `is_exporting`, except that SavedModels of TensorFlow use all operations.
        """

    def scan(self, body, carry, inputs, reverse=False, constants=()):
        """Loops over the leading axis with the contract of `jax.lax.scan`. Compilers do not unroll the loop.

        PyTorch: a Python loop, except in `torch.export`, where the number of steps may be open.

        `body(carry, slices, *constants)` returns `(carry, outputs)`. A loop that PyTorch exports reads no other tensor.
        """


class Autodiff(Protocol):
    def custom_gradient(self, forward, backward, plain=None, has_loops=True, once=None):
        """Returns a function of tensors with a custom gradient. JAX compiles it, and TensorFlow if it has loops.

        Args:
            forward: `forward(*tensors)` returns `(outputs, residuals)`.
            backward: `backward(residuals, gradients)` returns one gradient per input, None for an integer input.
                `gradients` has the structure of the outputs. On JAX and PyTorch a gradient may be a function without
                arguments, which is called if that gradient is needed.
            plain: `plain(*tensors)` computes the outputs if no gradient is needed. JAX and PyTorch only.
            has_loops: whether the functions have loops. TensorFlow compiles these, once per shape.
            once: the message of the RuntimeError that a second derivative raises, for a `backward` that autograd
                cannot differentiate. PyTorch only: on JAX and TensorFlow dynamic loops raise their own error.
        """

    def is_transformed(self):
        """Returns whether a transform of `torch.func` runs the caller. The kernels' gradients have no rule for it."""

    def can_trace_custom_gradient(self):
        """Returns whether the caller's tracer or transform supports `custom_gradient`.

        On PyTorch neither `torch.compile`, `torch.jit.trace`, `torch.func` nor forward mode does.
        """

    def remat(self, function, draws):
        """Returns `function` with rematerialization: it keeps inputs and outputs, and the backward pass recomputes it.

        `draws` tells whether the function may draw from PyTorch's random generator. The recomputation draws the same
        numbers. A CUDA graph cannot capture that.

        TensorFlow: `function` itself when called eagerly.
        """

    def input_gradient(self, function, x):
        """Returns the gradient of the scalar `function(x)` for tensor `x`. Zeros if it does not depend on `x`.

        PyTorch raises RuntimeError if the result requires no gradient.
        """


class Numerics(Protocol):
    def matmul(self, x, y):
        """Computes `keras.ops.matmul`. PyTorch: without Keras' promotion of equal dtypes."""

    def matmul_in_float32(self, x, y):
        """Multiplies two matrices of one dtype and returns float32.

        JAX and PyTorch on a GPU keep the float32 sums. TensorFlow and PyTorch on a CPU round the sums to the dtype of
        the inputs first.
        """

    def add_matmul(self, total, x, y):
        """Returns float32 `total + x @ y` for matrices x and y of one dtype. PyTorch changes `total`.

        Without gradients, for use inside `custom_gradient`.
        """

    def cross_entropy_of_rows(self, logits, targets):
        """Returns `(logs, losses, predicted)` of float32 logits `(n, v)` and the class numbers `targets (n,)`.

        `logs (n,)` are the logarithms of the sums of exponentials, `losses (n,)` the cross-entropies, and `predicted
        (n,)` int32 the most likely classes. Without gradients, for use inside `custom_gradient`.
        """

    def cross_entropy_gradient(self, logits, logs, targets, factors, dtype):
        """Returns the gradient of `factors (n,)` times the losses of `cross_entropy_of_rows`, `(n, v)` in `dtype`.

        PyTorch may overwrite `logits`. Without gradients, for use inside `custom_gradient`.
        """

    def plus_matmul(self, y, x, matrix):
        """Returns `y + x @ matrix` for `(..., f)`, `(..., r)` and `(r, f)` of one dtype.

        PyTorch overwrites `y`, which must be the caller's own.
        """

    def rms_norm(self, x, scale, epsilon):
        """Computes `keras.ops.rms_normalization` over the last axis. PyTorch: with its fused function, or in Triton."""

    def swiglu(self, gate, up):
        """Returns `silu(gate) * up`. PyTorch on a GPU: in Triton, which rounds the result only."""

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

    def has_fused_attention(self):
        """Returns whether `keras.ops.dot_product_attention` on a CPU needs memory linear in tokens. PyTorch: True."""

    def unmasked_attention(self, query, key, value, causal):
        """Returns `keras.ops.dot_product_attention` without a mask, for `(b, t, h, c)` and two of `(b, s, g, c)`."""

    def masked_attention(self, query, key, value, mask):
        """Returns `keras.ops.dot_product_attention`, with `mask (b, 1, t, s)` bool.

        The outputs of a query that sees no key are finite.
        """


class Decoding(Protocol):
    """Kernels for few tokens. Each function returns None if no such kernel applies.

    PyTorch has them on a GPU, without gradients. XLA fuses these operations itself.
    """

    def applies(self, x):
        """Returns whether these kernels may apply to `x (..., d)`, which has few rows."""

    def product(self, x, matrix, divisor=None):
        """Returns `x @ matrix` for `(..., k)` and `(k, n)`, divided by `divisor (n,)` if the matrix is int8."""

    def gated_product(self, x, gate, up, gate_divisor=None, up_divisor=None):
        """Returns `silu(x @ gate) * (x @ up)`; see `product`."""

    def added_norm(self, x, other, scale, epsilon):
        """Returns `x + other` and the RMSNorm of it over the last axis."""

    def norm(self, x, scale, epsilon):
        """Returns the RMSNorm of x over the last axis."""

    def norms_of_slices(self, x, scales, epsilon):
        """Returns x with RMSNorm in consecutive slices of the last axis, which are as wide as the `scales`."""

    def convolution_step(self, x, kernel, bias, state, silu):
        """Convolves one token `x (b, 1, e)` after the inputs `state (b, w - 1, e)`.

        Returns `(y, next state)`; see `keras_jamba.ops.causal_depthwise_conv`.
        """

    def scan_step(self, u, delta, A, B, C, D, z, bias, softplus, state):
        """Computes one token of the scan. Returns `(y, next state)`; see `keras_jamba.ops.selective_scan`."""

    def ssm_step(self, x, z, conv, state, weights, epsilon):
        """Computes one token of one row of a `SelectiveSSM` with norms.

        Args:
            x, z: `(1, 1, e)`, the input and the gate.
            conv, state: `(1, w - 1, e)` and `(1, e, n)` float32, the states.
            weights: dict with the keys of `keras_jamba._triton.ssm_step.Weights`.
            epsilon: number added to the mean squares in the norms.

        Returns:
            `(y (1, 1, e), next conv, next state)`.
        """


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

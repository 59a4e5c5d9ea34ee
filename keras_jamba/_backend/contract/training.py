"""Training loops and optimizers."""

from typing import Protocol


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

    def has_call_hooks(self, layer):
        """Returns whether hooks run around a call of the layer, and may use its result. PyTorch only."""

    def can_bypass_layer_call(self, layer, *args, **kwargs):
        """Returns whether `layer.call` may replace `layer`, an `EagerFastPath`, for these arguments.

        Keras must convert none of them, and the class of the layer must be one of this package.

        PyTorch only, because it launches op by op.
        """


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

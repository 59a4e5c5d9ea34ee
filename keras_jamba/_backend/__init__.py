"""What Keras does not offer, or offers only on some backends: one file a backend.

Every backend:

`name`: "jax", "tensorflow" or "torch".

`platform(x=None)`: "cpu", "gpu" or "tpu": where tensor `x` lies; without it, or where that is not known while a graph
is traced, where new tensors go.

`host_values(x)`: the values of a tensor as a NumPy array where they can be had without waiting for a
device, else None: while a graph is traced, and on an accelerator.

`with_shape(x, shape)`: the tensor itself, whose shape must fit this one, None for any size. A graph of TensorFlow may
not know the sizes when it is traced: then it checks them when it runs.

`compiling()`: whether a compiler takes what is being traced, which must then have shapes that do not depend on
values. TensorFlow's own graphs need no such shapes.

`compiled(function)`: a function of nested arrays whose work a compiler has taken once for each of their shapes; where
nothing compiles without being told what, the function itself.

`compiles()`: whether there is such a compiler, so that fewer shapes save time.

`inference(function, variables)`: the same for a function that reads `variables` and assigns none, without gradients;
what they hold when it is called counts, and is no part of what was compiled.

`repeated(body, variables)`: `(going, state) -> state` that calls `body(state) -> (going, state)` as long as `going`, a
bool, is true; otherwise as `inference`. For steps of many small operations: all of the loop is compiled, or on PyTorch
the body written down.

`scan(body, carry, inputs, reverse=False)`: a loop over the leading axis that stays a loop when
compiled, with the contract of `jax.lax.scan`: `body(carry, slices)` returns `(carry, outputs)`.

`recomputed(function)`: a function of tensors of which only inputs and outputs are kept for the gradient, and which is
computed again for it; the function itself where the backend cannot.

`input_gradient(function, x)`: the gradient, shaped like tensor `x`, of a function of it that returns a scalar.

`weights_changed(layer)`: to be called when a layer, or one inside, has got other variables after it was built.

`autocast(dtype)`: a context in which floating-point variables are read in this dtype.

`goes_straight(layer, x)`: whether a layer's `call` on this tensor does all that calling the layer does; only where
operations are launched one by one.

`without_autocast()`: a context in which variables are read as they are stored, in mixed precision too.

`may_log()`: whether a message can be logged where it is called.

`traced_by_example()`: whether TorchScript traces what is called, as `torch.onnx` does, and keeps the sizes it sees.

`native(kernel, portable)`: a kernel of `keras_jamba._native` as a differentiable `(tensors, options) -> outputs`
on tensors, any of which may be None; `portable` is the same function in operations of Keras.

`why_not_native(shape)`: None, or why such a function cannot be called where it is asked, for an input of this shape.

`custom_gradient(forward, backward, plain=None)`: a function of tensors whose gradient is written by hand; compiled,
where there is a compiler. `forward(*tensors)` returns `(outputs, residuals)`, `backward(residuals, gradients)` one
gradient an input, None for an integer one; gradients are structured as the outputs are. On jax and torch a gradient may
be a function without arguments, called if it is wanted, and `plain(*tensors)` computes the outputs where none is.

`sum_over_replicas(tensors)`: inside a step that several replicas take on parts of a batch, the sums over all of
them; the tensors themselves where there is one, or where they are sums already.

`device_name()`: what its maker calls the device that new tensors go to; "CPU" for a CPU.

`device_memory()`: `{"device_memory": bytes, "device_memory_peak": bytes}` on an accelerator that tells, else `{}`.

`start_trace(folder)`: begins to write the backend's own profile there; returns the function that ends it.

`process_index()`, `process_count()`: the number of this process among those that train together, and how many they are.

`of_all_processes(number)`: a list of what all these processes call it with, an integer of 32 bits each; they wait.

`pieces(variable)`: yields `(start, array)` for the pieces of a variable that are this process's to save: where each
begins along each axis, and a NumPy array, which nothing keeps. Those of all processes make up the variable; where each
process has a variable of its own, it yields it whole.

`assign_pieces(variable, read)`: gives a variable what `read(index)` returns for the parts that this process's devices
need, NumPy arrays; `index` has a slice for each axis.

`trains_without_data`: whether a step of `fit` that finds no data left has changed variables by then.

`captured(model, step)`: `step(data)`, the train function that Keras has made for a model, or what does the same faster;
where a compiler takes whole steps, `step` itself.

`random_states()`, `set_random_states(states)`: of the backend's own global generators, arrays of bytes.

`out_of_memory(error)`: whether an exception says that memory ran out.

`matmul_in_float32(x, y)`: of two matrices in the same dtype; the sums are not rounded to it where the device can.

`rms_norm(x, scale, epsilon)`: `keras.ops.rms_normalization` over the last axis.

`norm(tensors)`, `scaled(tensors, factor)`: of gradients: the norm of all together, float32, and each times a scalar.

`adamw(weights, gradients, momentums, velocities, maxima, *, step, rate, betas, epsilon, decay)`: a step of
`keras.optimizers.AdamW` by lists of its variables, all at once; `maxima` is empty without AMSGrad. None where a
compiler does so with Keras' own.

`Counter()`, where there is `adamw`: `read(variable)` is an integer variable on the host; what `keep(variable, value)`
was told it need not wait for, unless the variable has been changed since.

`parts()`: how the active distribution splits tensors among devices, with `mesh`, `batch`, `model` and `count(axis)`;
None where there is none of `training.layout_map`, and inside of `on_parts`.

`gathered(variable)`: its value as products use it, brought together where the devices of the axis for rows share it.

`off_mesh(x)`: a tensor that lies on no mesh of devices any more; as it is while a program is traced.

Only where `parts()` may be something (jax):

`on_parts(function, tensors, split, results)`: `function(tensors)`, a tuple, on each device's part of a dict of tensors;
`split`, by name, and `results` have an axis of the mesh, several or None for each axis of what goes in and comes out.

`constrained(x, axes)`: `x`, split so from here on.

`filled(shape, value, dtype, axes)`: a tensor of one number that is split so.

`exchanged(x, axis)`: `x[i]` goes to the i-th device of an axis, what that one has for this one comes; in `on_parts`.

`largest(x, axes)`: the largest of all devices' numbers; in `on_parts`.

Every backend:

`splits_models`: whether a `keras.distribution` may split the weights of a model among devices.

`first_batch(given, look, steps)`: the arguments `given` of a train, test or predict function that Keras made, after
`look(batch)` has got the first batch in them; the function then takes the same batches, at most `steps`.

`local_batch(data)`: a batch as such a function gets it, without what is only a backend's: None for an empty Optional,
one tensor for what several replicas have parts of.

`TrainerLoops`: a class before `keras.Model` for models whose loops leave them their weights however they end, and let
other threads read these; it needs `_this_loop()`, the innermost loop of this thread, a `Loop`, or None.

`Loop(kind)`: a context around a loop of such a model, with attributes `kind`, a method of `keras.Model`, and `looked`
and `begun`, both False to begin with, for whoever makes it.

`reading(variables)`: a context with tensors or variables that have their values, while a loop of another thread trains.

`on_host(x)`: a tensor as a NumPy array, whichever processes have parts of it; all of them call it.

`why_whole(model)`: None, or why weights that something was to split are whole all the same.

`DataParallel(devices)`: a context, with `replicas`, `shard` and `prepare(model)`, see `training.parallel`.

Only where shapes may depend on values (tensorflow, torch):

`split(x, counts)`: the rows of `x`, `counts[0]` of them, `counts[1]`, ...

Only where rows can be multiplied by the matrix of their group, and Triton runs (jax, torch):

`grouped_product(x, bank, counts, turned=False)`: rows of `x` `(rows, k)`, the first `counts[0]` of them times `bank[0]`
of `(x, k, n)`, the next `counts[1]` times `bank[1]`, ...; where `turned` the bank is `(x, n, k)`. `counts` is int32.

`grouped_sum(a, b, counts)`: its gradient for the bank, `(x, k, n)`: for each group its rows of `a` `(rows, k)`,
transposed, times those of `b` `(rows, n)`.

`why_not_grouped(platform, dtype, sizes)`: None, or why the two cannot be called for rows of these sizes.

`gpu()`: a `keras_jamba._triton.Gpu`, for kernels without a gradient.

`launched(program, portable)`: a program of `keras_jamba._triton` as `native` makes a function of a kernel.

`why_not_here()`: None, or why no kernel in Triton runs on this machine; `why_not_triton()`: or why what `gpu()` gives
cannot be used where it is asked.
"""

# ruff: noqa: F401, for which names there are depends on the backend
import keras
from keras.src.backend import AutocastScope, get_keras_mask, set_keras_mask

name = _BACKEND = keras.backend.backend()
trains_without_data = _BACKEND == "tensorflow"

if _BACKEND == "jax":
    from keras.ops import rms_normalization as rms_norm

    from keras_jamba._backend.loops_on_jax import Loop, TrainerLoops, reading
    from keras_jamba._backend.on_jax import (
        compiled,
        compiles,
        compiling,
        custom_gradient,
        device_memory,
        device_name,
        first_batch,
        gpu,
        grouped_product,
        grouped_sum,
        host_values,
        inference,
        input_gradient,
        launched,
        matmul_in_float32,
        may_log,
        native,
        of_all_processes,
        out_of_memory,
        platform,
        process_count,
        process_index,
        random_states,
        recomputed,
        repeated,
        scan,
        set_random_states,
        start_trace,
        sum_over_replicas,
        weights_changed,
        why_not_grouped,
        why_not_here,
        why_not_native,
        why_not_triton,
    )
    from keras_jamba._backend.parallel_on_jax import DataParallel
    from keras_jamba._backend.sharding_on_jax import (
        assign_pieces,
        constrained,
        exchanged,
        filled,
        gathered,
        largest,
        off_mesh,
        on_host,
        on_parts,
        parts,
        pieces,
        splits_models,
        why_whole,
    )
    from keras_jamba._backend.weights_one_by_one import Counter, adamw, norm, scaled
elif _BACKEND == "tensorflow":
    from keras.ops import rms_normalization as rms_norm

    from keras_jamba._backend.batches_on_tensorflow import TrainerLoops, first_batch, local_batch
    from keras_jamba._backend.on_tensorflow import (
        compiled,
        compiles,
        compiling,
        custom_gradient,
        device_memory,
        device_name,
        host_values,
        inference,
        input_gradient,
        matmul_in_float32,
        may_log,
        native,
        of_all_processes,
        out_of_memory,
        platform,
        process_count,
        process_index,
        random_states,
        recomputed,
        repeated,
        scan,
        set_random_states,
        split,
        start_trace,
        sum_over_replicas,
        weights_changed,
        why_not_native,
        with_shape,
    )
    from keras_jamba._backend.parallel_on_tensorflow import DataParallel
    from keras_jamba._backend.unsplit import why_whole
    from keras_jamba._backend.weights_one_by_one import Counter, adamw, norm, scaled
elif _BACKEND == "torch":
    from keras_jamba._backend.captured_on_torch import captured, weights_changed
    from keras_jamba._backend.on_torch import (
        compiled,
        compiles,
        compiling,
        custom_gradient,
        device_memory,
        device_name,
        first_batch,
        goes_straight,
        gpu,
        grouped_product,
        grouped_sum,
        host_values,
        inference,
        input_gradient,
        launched,
        matmul_in_float32,
        may_log,
        native,
        of_all_processes,
        out_of_memory,
        platform,
        process_count,
        process_index,
        random_states,
        recomputed,
        repeated,
        rms_norm,
        scan,
        set_random_states,
        split,
        start_trace,
        sum_over_replicas,
        traced_by_example,
        why_not_grouped,
        why_not_here,
        why_not_native,
        why_not_triton,
    )
    from keras_jamba._backend.parallel_on_torch import DataParallel, why_whole
    from keras_jamba._backend.weights_at_once_on_torch import Counter, adamw, norm, scaled
else:
    raise ImportError(
        "keras_jamba runs on the Keras backends 'jax', 'tensorflow' and 'torch'. "
        f"Received: KERAS_BACKEND={_BACKEND!r}. Set KERAS_BACKEND to one of the three before importing keras."
    )


if _BACKEND != "jax":
    from keras_jamba._backend.loops import Loop, reading
    from keras_jamba._backend.unsplit import (
        assign_pieces,
        gathered,
        off_mesh,
        on_host,
        parts,
        pieces,
        splits_models,
    )


if _BACKEND != "tensorflow":

    def local_batch(data):
        return data


if _BACKEND == "torch":

    class TrainerLoops:
        pass

else:

    def captured(model, step):
        return step

    def goes_straight(layer, x):
        return False

    def traced_by_example():
        return False


if _BACKEND != "tensorflow":

    def with_shape(x, shape):
        return x


def without_autocast():
    return AutocastScope(None)


def autocast(dtype):
    return AutocastScope(dtype)

"""All private attributes of Keras that the package uses.

Keras may change them without notice. Each has one function or one hook here, which a test checks against the installed
Keras. A hook is a class with a method that Keras calls by a private name.
"""

import contextlib
import functools
import io
import os
import sys
import threading
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask  # noqa: F401
from keras.src.backend.common.variables import AutocastScope
from keras.src.saving import saving_lib

# Layers

# The base class of mixins. Type checkers must take it for the Keras class that a class with a mixin also has.
Mixin: Any = object


def sublayers(layer, include_self=True):
    """Returns all layers inside a layer, outer layers before inner ones, with the layer itself first."""
    return layer._flatten_layers(include_self=include_self)


def direct_sublayers(layer):
    """Returns the layers that are attributes of a layer."""
    return list(layer._layers)


def named_sublayers(layer, kind, name=""):
    """Yields `(path, layer)` of each layer of class `kind` in `layer`; the path of `layer` itself is empty."""
    if isinstance(layer, kind):
        yield name, layer
    for inner in direct_sublayers(layer):
        yield from named_sublayers(inner, kind, f"{name}/{inner.name}" if name else inner.name)


def own_variables(layer):
    """Returns the `(trainable, non-trainable)` variables that a layer itself created, without its sublayers'."""
    return layer._trainable_variables, layer._non_trainable_variables


def mark_quantized(layer):
    """Marks the weights of a layer as quantized, so that Keras does not quantize them again."""
    layer._is_quantized = True


# The attribute behind each property of Keras' Dense and Embedding layers.
STORED_NAMES = {"kernel": "_kernel", "embeddings": "_embeddings"}


def stored_weight(layer, name):
    """Returns the variable behind the property `name` of a Dense or Embedding layer."""
    return getattr(layer, STORED_NAMES[name])


def store_weight(layer, name, variable):
    """Sets the variable behind the property `name` of a Dense or Embedding layer."""
    setattr(layer, STORED_NAMES[name], variable)


@contextlib.contextmanager
def unlocked(layer):
    """A context in which a built layer accepts new variables."""
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


def track_torch_parameters(layer):
    """Updates `parameters()` of a layer on PyTorch to its current variables."""
    for each in sublayers(layer):
        each._track_variables()


class PostBuildHook(Mixin):
    """A base class before `keras.layers.Layer`: Keras calls `_on_built()` after each build."""

    def _post_build(self):
        super()._post_build()
        self._on_built()


# Files


def save_weights(model, file, change=None):
    """Writes the weights of a model to a `.weights.h5` file. `change` maps its content, an `io.BytesIO`, to another."""
    # HDF5 crashes the process if the disk is full. It writes to memory, and Python's write raises OSError.
    stream = io.BytesIO()
    store = saving_lib.H5IOStore(stream, mode="w")
    try:
        saving_lib._save_state(model, weights_store=store, assets_store=None, inner_path="", visited_saveables=set())
    finally:
        store.close()
    stream = stream if change is None else change(stream)
    with open(file, "wb") as written:
        written.write(stream.getbuffer())


def save_archive(model, file):
    """Writes a model to a `.keras` file. HDF5 writes to memory, and never to the disk."""
    # For a model larger than half of the free memory, Keras lets HDF5 write beside the file, which it finds by the
    # stream's name. The name of this stream is a number, and Keras uses memory.
    with open(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666), "wb") as stream:
        saving_lib.save_model(model, stream)


# Variables and tensors


def stored_tensor(variable):
    """Returns the tensor of a variable, regardless of active scopes."""
    return variable._value


def release_tensor(variable):
    """Removes the tensor from a variable, so that its memory can be reused."""
    variable._value = None


def store_tensor(variable, value):
    """Stores a tensor of the variable's shape and dtype. `assign` also checks these, ten times as slowly."""
    variable._direct_assign(value)


_initialization = threading.local()  # the context `without_initial_values` of a thread


class _Empty(keras.initializers.Initializer):
    # JAX compiles the bound method of an initializer, if it shards the variable.
    def __call__(self, shape, dtype=None):
        return keras.ops.empty(shape, dtype=dtype)


@contextlib.contextmanager
def without_initial_values(is_filled_later):
    """A context in which this thread runs no initializer of the variables whose values are assigned later.

    `is_filled_later(path)` returns whether the variable of this path is one of them. The context is a list of their
    `(variable, initializer)`, for `initialize_others`.
    """
    _hook_initialization()
    before = vars(_initialization).copy()
    _initialization.is_filled_later, _initialization.skipped = is_filled_later, []
    try:
        yield _initialization.skipped
    finally:
        vars(_initialization).clear()
        vars(_initialization).update(before)


def initialize_others(skipped, variables):
    """Initializes the variables in `skipped` that are not `variables`, or have the path of another one of them."""
    filled = {variable.path: variable for variable in variables}
    for variable, initializer in skipped:
        if filled.get(variable.path) is not variable:
            variable.assign(initializer(variable.shape, dtype=variable.dtype))


@functools.cache
def _hook_initialization():
    initialize = keras.Variable._initialize_with_initializer

    def initialized(self, initializer):
        if getattr(_initialization, "is_filled_later", lambda path: False)(self._path):
            _initialization.skipped.append((self, initializer))
            initializer = _Empty()
        initialize(self, initializer)

    keras.Variable._initialize_with_initializer = initialized


# A context in which floating-point variables are read in the given dtype, or in their own dtype for None.
autocast = AutocastScope


def is_rematerialized(layer):
    """Returns whether a `keras.RematScope` was active while a layer was created."""
    return layer._remat_mode is not None


def torch_device():
    """Returns the name of the device on which Keras creates tensors on PyTorch: "cpu", "cuda", "cuda:1" or "meta"."""
    return sys.modules["keras.src.backend.torch.core"].get_device()


# Scopes

_SCOPES = (
    *("name_scope_stack", "remat_scope_stack", "stateless_scope", "symbolic_scope", "autocast_scope"),
    *("current_call_ctx", "tracking_on", "custom_objects_scope_dict", "safe_mode_saving", "torch_device"),
)


@contextlib.contextmanager
def restored_scopes():
    """A context, or a decorator, after which the scopes of Keras in this thread are as before if an error ends it.

    An interrupt inside `__enter__` or `__exit__` of a scope of Keras leaves the scope open. Later models would then
    have other paths, and variables would not take values.
    """
    before = {name: global_state.get_global_attribute(name) for name in _SCOPES}
    before = {name: list(value) if isinstance(value, list) else value for name, value in before.items()}
    try:
        yield
    except BaseException:
        for name, value in before.items():
            global_state.set_global_attribute(name, value)
        raise


# Models


def clear_losses(model):
    """Removes the losses that layers added in the last call."""
    model._clear_losses()


def given_to_compile(model):
    """Returns the losses and metrics that were passed to `compile`, and the functions that they wrap."""
    metrics, loss = model._compile_metrics, model._compile_loss
    given = [metrics and (metrics._user_metrics, metrics._user_weighted_metrics), loss and loss._user_loss]
    given = [x for x in keras.tree.flatten(given) if x is not None and not isinstance(x, str)]
    return given + [getattr(x, name) for x in given for name in ("fn", "_fn") if hasattr(x, name)]


def set_initial_epoch(model, epoch):
    """Sets the epoch at which the next `fit` begins. None selects its argument `initial_epoch`."""
    model._initial_epoch = epoch


def expects_probabilities(loss_or_metric):
    """Returns whether a loss or metric was made with `from_logits=False`."""
    # AUC stores the flag under a private name.
    flags = (getattr(loss_or_metric, name, None) for name in ("from_logits", "_from_logits"))
    return any(flag is not None and not flag for flag in flags)


class SymbolicBuildHook:
    """A base class before `keras.Model`: Keras calls `_symbolic_build_data(iterator)` before a symbolic build."""

    def _symbolic_build(self, iterator=None, data_batch=None):
        super()._symbolic_build(None if iterator is None else self._symbolic_build_data(iterator), data_batch)


class TensorFlowReplicasHook:
    """A base class before `keras.Model`: Keras calls `_replicas_data(iterator)` before the first step of replicas."""

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if iterator is not None and self._distribute_strategy is not None:
            iterator = self._replicas_data(iterator)
        super()._maybe_symbolic_build(iterator, data_batch)


class JaxTrainerHooks:
    """A base class before `keras.Model`: the state that Keras' trainer on JAX keeps between steps.

    A subclass defines the properties `_loop_state` and `_loop_state_synced`, and overrides `_first_loop_state` and
    `_function_of_iterator`.
    """

    _jax_state = property(lambda self: self._loop_state, lambda self, state: setattr(self, "_loop_state", state))
    _jax_state_synced = property(
        lambda self: self._loop_state_synced, lambda self, synced: setattr(self, "_loop_state_synced", synced)
    )

    def __setattr__(self, name, value):
        # Keras would look at every array of the state, after every step, to track layers and variables.
        if name in ("_jax_state", "_loop_state"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _get_jax_state(self, **wanted):
        return self._first_loop_state(**wanted)

    def _first_loop_state(self, **wanted):
        return super()._get_jax_state(**wanted)

    def _make_function(self, step_function, concatenate_outputs=False, **compiled_inside):
        if compiled_inside:
            # Keras 3.16 compiles the step here, before `_function_of_iterator` could wrap it.
            raise RuntimeError(
                "Models of keras_jamba need the trainer of Keras 3.15 on JAX. "
                f"Received: keras {keras.__version__}. Install 'keras>=3.15.1,<3.16'."
            )
        return self._function_of_iterator(step_function, concatenate_outputs)

    def _function_of_iterator(self, step_function, concatenate_outputs=False):
        return super()._make_function(step_function, concatenate_outputs)

    def _state_shardings(self):
        """Returns the shardings of the trainable, non-trainable, optimizer and metrics variables."""
        return self._get_state_sharding_spec()


def is_keras_export(module_name):
    """Returns whether a module is the part of Keras that exports models."""
    return module_name.startswith("keras.src.export.")


# Data


def dataset_workers(dataset):
    """Returns the argument `workers` of a `keras.utils.PyDataset`."""
    return dataset._workers


def asking_adapter(dataset, depth):
    """Returns Keras' adapter of `dataset` if it is `self` in the frame `depth` above the caller, else None."""
    caller = sys._getframe(depth + 1).f_locals.get("self")
    return caller if getattr(caller, "py_dataset", None) is dataset and hasattr(caller, "shuffle") else None


# Distribution


def layout_map(distribution):
    """Returns the layout map of a distribution, or None."""
    return getattr(distribution, "_layout_map", None)

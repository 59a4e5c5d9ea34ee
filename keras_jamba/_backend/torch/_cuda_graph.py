"""Training steps on PyTorch, captured as CUDA graphs and replayed with one launch.

A step of a small model has thousands of kernels, and each takes longer to launch than to run. The graph contains the
forward pass, the loss, the metrics and the backward pass of Keras' `train_step`. The optimizer's update runs outside
the graph: it has few kernels and counts its steps in Python.
"""

import contextlib
import gc
import logging
import threading
import warnings

import keras
import numpy as np
import torch
from torch.utils import _pytree

from keras_jamba import _keras_internals
from keras_jamba._backend.torch._constants import Constants, without_sync_debug
from keras_jamba._backend.torch._weight_casts import WeightCasts

_logger = logging.getLogger("keras_jamba")
# Steps per kind of input before the capture. They create all objects that are created once.
_WARMUP_STEPS = 3
# Methods that a step calls and that may be overridden on the instance.
_METHODS = ("train_step", "compute_loss", "compute_metrics", "call")
# Each graph keeps all memory of a step, except the memory pool that graphs share.
_MAX_GRAPHS = 8


# The number of times that variables of any layer have been replaced.
_changes = 0


def on_weights_replaced(layer):
    global _changes
    _changes += 1
    # Otherwise modules would keep the old variables and return them from `parameters()`.
    _keras_internals.track_torch_parameters(layer)


def with_cuda_graph(model, step):
    reason = _why_not(model)
    if reason is None:
        return _CapturedStep(model, step)
    _logger.debug("Training steps are not captured: %s", reason)
    return step


def _why_not(model):
    if not _has_gpu():
        return "there is no CUDA device"
    if model.run_eagerly or model.jit_compile:
        return "compile was called with run_eagerly=True or jit_compile=True"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "the processes of a group communicate in their steps"
    if type(model).train_step is not keras.Model.train_step or not vars(model).keys().isdisjoint(_METHODS):
        return "the model overrides Keras' train_step or a method that it calls"
    # Unknown Python code may behave differently at each step. A replay would not repeat that.
    unknown = [x for x in _layers_and_losses(model) if not _module(x).startswith(("keras.", "keras_jamba."))]
    return f"{unknown[0]!r} belongs neither to Keras nor to keras_jamba" if unknown else None


def _has_gpu():
    return torch.cuda.is_available()


def _layers_and_losses(model):
    layers = [type(layer) for layer in _keras_internals.sublayers(model)]
    return layers + _keras_internals.given_to_compile(model)


def _module(x):
    return getattr(x, "__module__", type(x).__module__)


class _CapturedStep:
    def __init__(self, model, step):
        self.model, self.step = model, step
        self.seen, self.programs = {}, {}
        self.constants, self.casts = Constants(), {}

    def __call__(self, data):
        leaves, structure = _pytree.tree_flatten(data[0])
        kind = self._kind(leaves, structure)
        program = self.programs.get(kind)
        if program and program.is_stale():
            program = self.programs.pop(kind)
            self.seen[kind] = 0
        elif program:
            return program(leaves)
        self.seen[kind] = seen = self.seen.get(kind, 0) + 1
        if kind is None or seen < _WARMUP_STEPS or kind in self.programs:
            return self.step(data)
        if seen == _WARMUP_STEPS:
            return self._warmed_up(kind, leaves, structure)
        self.programs[kind] = self._program(leaves, structure, self.casts.pop(kind))
        if len(self.programs) > _MAX_GRAPHS:
            del self.programs[next(iter(self.programs))]
        return self(data)

    def _kind(self, leaves, structure):
        """Returns the key of the graph for these inputs, or None if they cannot be captured."""
        if not all(x is None or isinstance(x, torch.Tensor) or _is_numbers(x) for x in leaves):
            return None
        weights = *map(id, self.model.trainable_variables), id(self.model.optimizer), _changes
        return structure, weights, *((None, None) if x is None else (tuple(x.shape), str(x.dtype)) for x in leaves)

    def _warmed_up(self, kind, leaves, structure):
        """Runs the warm-up step on a side stream that PyTorch requires before a capture."""
        leaves = [None if x is None else keras.ops.convert_to_tensor(x) for x in leaves]
        data = _pytree.tree_unflatten(leaves, structure)
        casts = self.casts[kind] = WeightCasts()
        with (
            _side_stream(),
            _synchronizations() as waits,
            self.constants.recording(),
            self._without_old_graphs(),
            casts.recording(),
        ):
            with _replaced_apply(self.model, lambda apply, *given: without_sync_debug(apply, *given)):
                logs = self.step([data])
        if waits:
            _logger.info("Training steps are not captured, because they wait for the device: %s", waits[0])
            self.programs[kind] = None
            del self.casts[kind]
        return logs

    def _program(self, leaves, structure, casts):
        pool = next((program.graph.pool for program in self.programs.values() if program), None)
        try:
            with self.constants.replaying(), self._without_old_graphs(), casts.replaying():
                return _GraphedStep(self.model, leaves, structure, pool, casts.cast_all)
        except Exception as error:
            # The uncaptured step still works. If it does not, it raises its own error.
            _logger.info("Training steps are not captured: %s", error)
            return None

    @contextlib.contextmanager
    def _without_old_graphs(self):
        # Losses and uncollected garbage keep parts of old autograd graphs, which belong to other streams.
        _keras_internals.clear_losses(self.model)
        gc.collect()
        try:
            yield
        finally:
            _keras_internals.clear_losses(self.model)
            gc.collect()


def _is_numbers(x):
    return isinstance(x, np.ndarray) and x.dtype.kind in "biuf"


@contextlib.contextmanager
def _side_stream():
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


@contextlib.contextmanager
def _synchronizations():
    """A context with the list of operations that wait for the device. No graph can contain them."""
    found, others, owner = [], [], threading.current_thread()
    mode = torch.cuda.get_sync_debug_mode()

    def show(message, category, filename, lineno, file=None, line=None):
        if "Synchronization debug mode" in str(message):
            return
        waits = "synchronizing CUDA operation" in str(message)
        if waits and _runs_step_of(owner):
            found.append(f"{filename}:{lineno}")
        elif not waits or mode:
            # Other threads may wait. Their warnings are for a user who has set the mode.
            others.append((message, category, filename, lineno))

    # Warning filters are shared by all threads of the process.
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for each in others:
        warnings.warn_explicit(*each)


def _runs_step_of(owner):
    """Returns whether this thread runs the owner's step. Keras reads the logs of the last step in another thread."""
    thread = threading.current_thread()
    # Threads that Python did not start, such as those of PyTorch's autograd, are dummy threads.
    return thread is owner or isinstance(thread, threading._DummyThread)


@contextlib.contextmanager
def _replaced_apply(model, instead):
    """A context that replaces the optimizer's `apply(*given)` by `instead(apply, *given)`."""
    optimizer, own = model.optimizer, vars(model.optimizer).get("apply")
    apply = optimizer.apply
    optimizer.apply = lambda *given: instead(apply, *given)
    try:
        yield
    finally:
        del optimizer.apply
        if own is not None:
            optimizer.apply = own


class _GraphedStep:
    """A captured step for inputs of one kind. Each call copies its inputs into the tensors that the graph reads."""

    def __init__(self, model, leaves, structure, pool, cast_all):
        self.optimizer, self.weights = model.optimizer, model.weights
        self.places = self._places()
        self.inputs = [None if x is None else keras.ops.convert_to_tensor(x).clone() for x in leaves]
        data = _pytree.tree_unflatten(self.inputs, structure)

        def step():
            cast_all([_keras_internals.stored_tensor(v) for v in model.trainable_variables])
            updates = []
            with _replaced_apply(model, lambda apply, *given: updates.append(given)):
                return model.train_step(data), updates

        self.graph = Graph(step, pool)

    def _places(self):
        return [_keras_internals.stored_tensor(variable).data_ptr() for variable in self.weights]

    def is_stale(self):
        """Returns whether weights have moved in memory, as after `model.cpu()` and `model.cuda()`."""
        return self.places != self._places()

    def __call__(self, leaves):
        for place, x in zip(self.inputs, leaves, strict=True):
            if place is not None:
                place.copy_(_staged(_tensor(x), place.device), non_blocking=True)
        self.graph.replay()
        logs, updates = self.graph.outputs
        with torch.no_grad():
            for given in updates:
                self.optimizer.apply(*given)
        # The next replay overwrites the outputs.
        return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in logs.items()}


class Graph:
    """The device operations of a function. The capture computes nothing, and each replay fills `outputs`."""

    def __init__(self, function, pool=None, stream=None):
        self.graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may load data meanwhile.
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.outputs = function()
        finally:
            # PyTorch stays on the capture stream if the capture fails.
            torch.cuda.set_stream(before)
        self.pool, self.replay = self.graph.pool(), self.graph.replay


def _tensor(x):
    if isinstance(x, torch.Tensor):
        return x
    with keras.device("cpu"):
        return keras.ops.convert_to_tensor(x)


def _staged(x, device):
    """Returns a tensor that an asynchronous copy to `device` may read, although the owner of `x` overwrites it.

    A copy from memory that is not pinned would wait for all earlier work of the device. PyTorch reuses the pinned
    memory after the copy.
    """
    if x.device.type != "cpu" or device.type != "cuda":
        return x
    return torch.empty_like(x, pin_memory=True).copy_(x)

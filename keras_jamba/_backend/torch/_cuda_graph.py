"""Training steps on PyTorch that are captured as a CUDA graph, and launched at once.

A step of a small model is thousands of kernels, each of which takes longer to launch than to run. Captured are the
forward pass, the loss, the metrics and the backward pass, all that Keras' own `train_step` does but for the optimizer's
part, which is few kernels and counts its steps in Python.
"""

import contextlib
import functools
import gc
import logging
import threading
import warnings

import keras
import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from keras_jamba import _keras_internals

_logger = logging.getLogger("keras_jamba")
# Steps with inputs of a kind before one is captured: until then what is made once has been made.
_BEFORE = 3
# What a step calls of a model, and may be set on the model itself.
_METHODS = ("train_step", "compute_loss", "compute_metrics", "call")
_HOST_VALUES = (bool, int, float, tuple, list, np.ndarray)
# Each keeps all that a step has in memory at once, but for what programs share.
_MOST = 8


# How often some layer has got other variables.
_changes = 0


def on_weights_replaced(layer):
    global _changes
    _changes += 1
    # Modules would keep, and give to `parameters()`, what was there before.
    _keras_internals.track_torch_parameters(layer)


def with_cuda_graph(model, step):
    reason = _why_not(model)
    if reason is None:
        return _Captured(model, step)
    _logger.debug("Training steps are not captured: %s", reason)
    return step


def _why_not(model):
    if not _has_gpu():
        return "there is no CUDA device"
    if model.run_eagerly or model.jit_compile:
        return "compile(run_eagerly=True) or jit_compile=True asks for something else"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "the processes of a group talk to each other in their steps"
    if type(model).train_step is not keras.Model.train_step or not vars(model).keys().isdisjoint(_METHODS):
        return "it is not Keras' own step"
    # Python code that is not known may do something else at each step, or only look as if it did.
    unknown = [x for x in _parts(model) if not _module(x).startswith(("keras.", "keras_jamba."))]
    return f"{unknown[0]!r} is neither Keras' nor ours" if unknown else None


def _has_gpu():
    return torch.cuda.is_available()


def _parts(model):
    layers = [type(layer) for layer in _keras_internals.sublayers(model)]
    return layers + _keras_internals.given_to_compile(model)


def _module(x):
    return getattr(x, "__module__", type(x).__module__)


class _Captured:
    def __init__(self, model, step):
        self.model, self.step = model, step
        self.seen, self.programs = {}, {}
        self.constants = _Constants()

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
        if kind is None or seen < _BEFORE or kind in self.programs:
            return self.step(data)
        if seen == _BEFORE:
            return self._rehearsed(kind, leaves, structure)
        self.programs[kind] = self._program(leaves, structure)
        if len(self.programs) > _MOST:
            del self.programs[next(iter(self.programs))]
        return self(data)

    def _kind(self, leaves, structure):
        """What a program is for, or None if there can be none."""
        if not all(x is None or isinstance(x, torch.Tensor) or _is_numbers(x) for x in leaves):
            return None
        weights = *map(id, self.model.trainable_variables), id(self.model.optimizer), _changes
        return structure, weights, *((None, None) if x is None else (tuple(x.shape), str(x.dtype)) for x in leaves)

    def _rehearsed(self, kind, leaves, structure):
        """A step as PyTorch wants one before it captures, so that nothing is made for the first time in that."""
        leaves = [None if x is None else keras.ops.convert_to_tensor(x) for x in leaves]
        data = _pytree.tree_unflatten(leaves, structure)
        with _another_stream(), _waits() as waits, self.constants.kept(), self._without_old_losses():
            with _optimizer_of(self.model, lambda apply, *given: _not_watched(apply, *given)):
                logs = self.step([data])
        if waits:
            _logger.info("Training steps are not captured, since they wait for the device: %s", waits[0])
            self.programs[kind] = None
        return logs

    def _program(self, leaves, structure):
        pool = next((program.graph.pool for program in self.programs.values() if program), None)
        try:
            with self.constants.taken(), self._without_old_losses():
                return _Program(self.model, leaves, structure, pool)
        except Exception as error:
            # Whatever it is: the step works as it is, and if it does not, says so itself.
            _logger.info("Training steps go on uncaptured: %s", error)
            return None

    @contextlib.contextmanager
    def _without_old_losses(self):
        # They, and what only waits to be collected, keep parts of a step's autograd graph, which belong to its stream.
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
def _another_stream():
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


@contextlib.contextmanager
def _waits():
    """The list of what is said about operations that wait for the device, which no graph can hold."""
    found, others, owner = [], [], threading.current_thread()

    def show(message, category, filename, lineno, file=None, line=None):
        if "Synchronization debug mode" in str(message):
            return
        if "synchronizing CUDA operation" in str(message) and _is_part_of(owner):
            found.append(f"{filename}:{lineno}")
        else:
            others.append((message, category, filename, lineno))

    # All threads of a process show what they have to say in one place.
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for each in others:
        warnings.warn_explicit(*each)


def _is_part_of(owner):
    """Whether this thread works for the owner's step. Keras reads the logs of the step before in one of its own."""
    thread = threading.current_thread()
    # As which Python knows threads that it has not started, such as those in which PyTorch computes gradients.
    return thread is owner or isinstance(thread, threading._DummyThread)


def _not_watched(function, *given):
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        return function(*given)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def _optimizer_of(model, instead):
    """`instead(apply, *given)` for the optimizer's `apply(*given)`."""
    optimizer, own = model.optimizer, vars(model.optimizer).get("apply")
    apply = optimizer.apply
    optimizer.apply = lambda *given: instead(apply, *given)
    try:
        yield
    finally:
        del optimizer.apply
        if own is not None:
            optimizer.apply = own


class _Program:
    """A step for inputs of one kind: they are copied to where the graph reads them."""

    def __init__(self, model, leaves, structure, pool):
        self.optimizer, self.weights = model.optimizer, model.weights
        self.places = self._places()
        self.inputs = [None if x is None else keras.ops.convert_to_tensor(x).clone() for x in leaves]
        data = _pytree.tree_unflatten(self.inputs, structure)

        def step():
            updates = []
            with _optimizer_of(model, lambda apply, *given: updates.append(given)):
                return model.train_step(data), updates

        self.graph = Graph(step, pool)

    def _places(self):
        return [_keras_internals.stored_tensor(variable).data_ptr() for variable in self.weights]

    def is_stale(self):
        """Whether weights lie elsewhere by now, as after `model.cpu()` and `model.cuda()`."""
        return self.places != self._places()

    def __call__(self, leaves):
        for place, x in zip(self.inputs, leaves, strict=True):
            if place is not None:
                x = _tensor(x)
                # What is pinned may be filled again by whoever owns it before it has been read.
                place.copy_(x, non_blocking=not x.is_pinned())
        self.graph.replay()
        logs, updates = self.graph.outputs
        with torch.no_grad():
            for given in updates:
                self.optimizer.apply(*given)
        # The next step writes into the same places.
        return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in logs.items()}


class Graph:
    """What a function does on the device. While it is captured nothing is computed: its outputs are places so far."""

    def __init__(self, function, pool):
        self.graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads, that load data, may do what they like.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.outputs = function()
        finally:
            # PyTorch stays on the other stream where a capture fails.
            torch.cuda.set_stream(before)
        self.pool, self.replay = self.graph.pool(), self.graph.replay


def _tensor(x):
    if isinstance(x, torch.Tensor):
        return x
    with keras.device("cpu"):
        return keras.ops.convert_to_tensor(x)


class _Constants(TorchFunctionMode):
    """What is taken from the host to the device: a rehearsal keeps it, while a graph is captured nothing can be."""

    def __init__(self):
        super().__init__()
        self.found, self.complete = {}, False

    def kept(self):
        self.complete = False
        return self

    def taken(self):
        self.complete = True
        return self

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.as_tensor or not args or not isinstance(args[0], _HOST_VALUES):
            return function(*args, **kwargs)
        value = np.asarray(args[0])
        key = value.shape, str(value.dtype), value.tobytes(), *(str(kwargs.get(name)) for name in ("dtype", "device"))
        if key not in self.found:
            if self.complete:
                return function(*args, **kwargs)
            self.found[key] = _not_watched(functools.partial(function, *args, **kwargs))
        # A copy, for whoever writes into it.
        return self.found[key].clone()

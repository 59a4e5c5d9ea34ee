"""Training steps on PyTorch that are captured as a CUDA graph, and launched at once.

A step of a small model is thousands of kernels, each of which takes longer to launch than to run. Captured are the
forward pass, the loss, the metrics and the backward pass, all that Keras' own `train_step` does but for the optimizer's
part, which is few kernels and counts its steps in Python.
"""

import contextlib
import gc
import logging

import keras
import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

_logger = logging.getLogger("keras_jamba")
# Steps with inputs of a kind before one is captured: until then what is made once has been made.
_BEFORE = 3
_HOSTED = (bool, int, float, tuple, list, np.ndarray)
# Each keeps all that a step has in memory at once, but for what programs share.
_MOST = 8


def captured(model, step):
    """`step(data)`, the train function that Keras has made for a model, or what does the same faster."""
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
    if "train_step" in vars(model) or type(model).train_step is not keras.Model.train_step:
        return "train_step is not Keras' own"
    # Python code that is not known may do something else at each step, or only look as if it did.
    unknown = [x for x in _parts(model) if not _module(x).startswith(("keras.", "keras_jamba."))]
    return f"{unknown[0]!r} is neither Keras' nor ours" if unknown else None


def _has_gpu():
    return torch.cuda.is_available()


def _parts(model):
    metrics, loss = model._compile_metrics, model._compile_loss
    given = [metrics and (metrics._user_metrics, metrics._user_weighted_metrics), loss and loss._user_loss]
    given = [x for x in keras.tree.flatten(given) if x is not None and not isinstance(x, str)]
    functions = [getattr(x, name) for x in given for name in ("fn", "_fn") if hasattr(x, name)]
    return [type(layer) for layer in model._flatten_layers()] + given + functions


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
        if kind is None:
            return self.step(data)
        if kind not in self.programs:
            seen = self.seen[kind] = self.seen.get(kind, 0) + 1
            if seen < _BEFORE or len(self.programs) == _MOST:
                return self.step(data)
            if seen == _BEFORE:
                return self._rehearsed(data)
            self.programs[kind] = self._captured(leaves, structure)
        program = self.programs[kind]
        return self.step(data) if program is None else program(leaves)

    def _kind(self, leaves, structure):
        """What a program is for, or None if there can be none."""
        if not all(x is None or isinstance(x, torch.Tensor) or _is_numbers(x) for x in leaves):
            return None
        weights = tuple(map(id, self.model.trainable_variables))
        return structure, weights, *((None, None) if x is None else (tuple(x.shape), str(x.dtype)) for x in leaves)

    def _rehearsed(self, data):
        # As PyTorch wants it, so that nothing is made for the first time while it captures.
        with _on_another_stream(), self.constants.kept(), self._losses_let_go():
            return self.step(data)

    def _captured(self, leaves, structure):
        pool = next((program.graph.pool for program in self.programs.values() if program), None)
        try:
            with self.constants.taken(), self._losses_let_go():
                return _Program(self.model, leaves, structure, pool)
        except Exception as error:
            # Whatever it is: the step works as it is, and if it does not, says so itself.
            _logger.info("Training steps go on uncaptured: %s", error)
            return None

    @contextlib.contextmanager
    def _losses_let_go(self):
        # They, and what only waits to be collected, keep parts of a step's autograd graph, which belong to its stream.
        self.model._clear_losses()
        gc.collect()
        yield
        self.model._clear_losses()
        gc.collect()


def _is_numbers(x):
    return isinstance(x, np.ndarray) and x.dtype.kind in "biuf"


@contextlib.contextmanager
def _on_another_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class _Program:
    """A step for inputs of one kind: they are copied to where the graph reads them."""

    def __init__(self, model, leaves, structure, pool):
        self.optimizer = model.optimizer
        self.inputs = [None if x is None else keras.ops.convert_to_tensor(x).clone() for x in leaves]
        data = _pytree.tree_unflatten(self.inputs, structure)

        def step():
            updates = []
            self.optimizer.apply = lambda *given: updates.append(given)
            try:
                return model.train_step(data), updates
            finally:
                del self.optimizer.apply

        self.graph = Graph(step, pool)

    def __call__(self, leaves):
        for place, x in zip(self.inputs, leaves, strict=True):
            if place is not None:
                place.copy_(_tensor(x), non_blocking=True)
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
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, that load data, may do what they like.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = function()
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
        if function is not torch.as_tensor or not isinstance(args[0], _HOSTED):
            return function(*args, **kwargs)
        value = np.asarray(args[0])
        key = value.shape, str(value.dtype), value.tobytes(), *(str(kwargs.get(name)) for name in ("dtype", "device"))
        if key not in self.found:
            found = function(*args, **kwargs)
            if self.complete:
                return found
            self.found[key] = found
        # A copy, for whoever writes into it.
        return self.found[key].clone()

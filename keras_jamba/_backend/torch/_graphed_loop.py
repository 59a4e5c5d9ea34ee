"""Loops of inference on a GPU, with PyTorch: the body is captured as a CUDA graph, and each replay is one launch.

A step of generation has about a thousand kernels, and most take longer to launch than to run.
"""

import contextlib
import logging
import threading
import weakref

import torch
from torch.utils import _pytree

from keras_jamba import _keras_internals
from keras_jamba._backend.torch._constants import Constants
from keras_jamba._backend.torch._cuda_graph import Graph, _side_stream, _synchronizations
from keras_jamba._backend.torch._owned_state import OwnedState
from keras_jamba._backend.torch._partial_evaluation import PartialEvaluation

_logger = logging.getLogger("keras_jamba")
# Steps of the same kind before the capture. They compile kernels, and a short loop needs no graph.
_PLAIN_STEPS = 4
# Steps between two reads of the condition, if further steps do no harm.
_CHECK_INTERVAL = 8
# A capture may fail because of another thread.
_ATTEMPTS = 3
# Graphs of the process. Each holds a state, and the memory of one step.
_MAX_GRAPHS = 8
# Of all kept graphs, the least recently used first: weak references to the loop, and the kind.
_kept: list[tuple] = []
_lock = threading.RLock()


class GraphedLoop:
    """Calls `body(state) -> (going, state)` while `going` is true, with one graph per kind of state.

    Args:
        body: a function of nested tensors, which reads `variables` and assigns nothing.
        variables: the Keras variables that `body` reads.
        folds: whether `body` consists of operations of Keras and this package; see `PartialEvaluation`.
        overwrites: whether `body` may write into the tensors of the state that it receives.
        otherwise: `otherwise(going, state, steps) -> state`, the loop for states that cannot be captured.
    """

    def __init__(self, body, variables, folds, overwrites, otherwise):
        self.body, self.variables, self.otherwise = body, list(variables), otherwise
        self.options = dict(folds=folds, overwrites=overwrites)
        self.programs, self.counts, self.refusals = {}, {}, {}

    def __call__(self, going, state, steps=None):
        leaves = _pytree.tree_leaves(state)
        if not _are_on_one_gpu(leaves):
            return self.otherwise(going, state, steps)
        with torch.cuda.device(leaves[0].device) if leaves[0].is_cuda else contextlib.nullcontext():
            return self._run(going, state, steps)

    def _run(self, going, state, steps):
        done = 0
        while (steps is None or done < steps) and going:
            kind, left = _kind(state), None if steps is None else steps - done
            if self.refusals.get(kind, 0) >= _ATTEMPTS:
                return self.otherwise(going, state, left)
            if self._is_ready(kind) and (program := self._program(kind, state)):
                return program.run(state, left)
            going, state = self.body(state)
            self.counts[kind] = self.counts.get(kind, 0) + 1
            done += 1
        return state

    def _is_ready(self, kind):
        return kind in self.programs or self.counts.get(kind, 0) >= _PLAIN_STEPS * (1 + self.refusals.get(kind, 0))

    def _program(self, kind, state):
        """Returns the captured program of this kind, or None if its capture fails."""
        with _lock:
            weights = [_keras_internals.stored_tensor(variable) for variable in self.variables]
            program = self.programs.get(kind)
            try:
                if program is None or program.has_moved(weights):
                    self.programs[kind] = program = _Program(self.body, state, weights, **self.options)
            except Exception as error:
                # The loop without a graph still works. If it does not, it raises its own error.
                self.refusals[kind] = self.refusals.get(kind, 0) + 1
                self.programs.pop(kind, None)
                _logger.info("Steps of generation are not captured: %s", error)
                return None
            _keep(self, kind)
            return program


def _keep(loop, kind):
    """Makes a graph the most recently used one, and releases the least recently used one beyond _MAX_GRAPHS."""
    alive = [(other, own) for other, own in _kept if other() is not None and (other() is not loop or own != kind)]
    _kept[:] = [*alive, (weakref.ref(loop), kind)]
    while len(_kept) > _MAX_GRAPHS:
        other, own = _kept.pop(0)
        # A thread that runs the graph keeps it until it has finished.
        if (old := other()) is not None:
            old.programs.pop(own, None)
            old.counts.pop(own, None)


def _are_on_one_gpu(leaves):
    return all(isinstance(x, torch.Tensor) and x.is_cuda and x.device == leaves[0].device for x in leaves)


def _kind(state):
    leaves, structure = _pytree.tree_flatten(state)
    return structure, *((x.shape, x.dtype, x.device) for x in leaves)


class _Program:
    """A captured body: each replay reads the state in fixed memory and writes the next one there."""

    def __init__(self, body, state, weights, folds, overwrites):
        self.places, self.lock = [x.data_ptr() for x in weights], threading.Lock()
        leaves, self.structure = _pytree.tree_flatten(state)
        self.state = [x.clone(memory_format=torch.contiguous_format) for x in leaves]
        # The graph reads the constants, so they must live as long as it.
        self.constants, self.finished = Constants(), torch.cuda.Event() if leaves[0].is_cuda else None
        self.evaluated = PartialEvaluation(weights, self.constants, folds)
        owned = OwnedState(self.state if overwrites else ())

        def step():
            with owned:
                going, state = body(_pytree.tree_unflatten(self.state, self.structure))
            self._store(_pytree.tree_flatten(state))
            return going

        # The capture needs the constants of a step, on another stream than the usual one.
        with _side_stream(), _synchronizations() as waits, self.constants.recording():
            self.evaluated.record(step)
        if waits:
            raise RuntimeError(f"a step waits for the device, at {waits[0]}")
        with self.constants.replaying(), self.evaluated.replaying():
            # PyTorch's own capture stream belongs to the first device that was used.
            self.graph = Graph(step, stream=torch.cuda.Stream() if leaves[0].is_cuda else None)

    def _store(self, found):
        leaves, structure = found
        if structure != self.structure:
            raise RuntimeError("a step changes the structure of the state")
        memory = {x.untyped_storage().data_ptr() for x in self.state}
        pairs = []
        for place, x in zip(self.state, leaves, strict=True):
            if x.shape != place.shape or x.dtype != place.dtype:
                raise RuntimeError("a step changes the shapes of the state")
            if x is place or (x.data_ptr() == place.data_ptr() and x.stride() == place.stride()):
                continue  # unchanged, or written in place
            # Another place's memory may be overwritten before it is read.
            pairs.append((place, x.clone() if x.untyped_storage().data_ptr() in memory else x))
        _copy(pairs)

    def has_moved(self, weights):
        """Returns whether weights are elsewhere in memory, as after `model.cpu()` and `model.cuda()`."""
        return self.places != [x.data_ptr() for x in weights]

    def run(self, state, steps):
        """Returns the state after `steps` steps, or after those with a true condition if `steps` is None.

        With `steps`, it may go on for a few steps after the condition became false.
        """
        with self.lock, self._in_order():
            # A stream runs one step at a time. It notices the changes of weights that PyTorch counts.
            self.evaluated.refresh(always=steps != 1)
            _copy(list(zip(self.state, _pytree.tree_leaves(state), strict=True)))
            self._replay(steps)
            made = [torch.empty_like(x) for x in self.state]
            _copy(list(zip(made, self.state, strict=True)))
        return _pytree.tree_unflatten(made, self.structure)

    def _replay(self, steps):
        done, interval = 0, 1 if steps is None else _CHECK_INTERVAL
        while steps is None or done < steps:
            count = interval if steps is None else min(interval, steps - done)
            for _ in range(count):
                self.graph.replay()
            done += count
            if done != steps and not self.graph.outputs:
                break

    @contextlib.contextmanager
    def _in_order(self):
        """A context that begins after the last run on the device, which may have been on another stream."""
        if self.finished is not None:
            torch.cuda.current_stream().wait_event(self.finished)
        try:
            yield
        finally:
            if self.finished is not None:
                self.finished.record()


def _copy(pairs):
    """Copies tensors `(to, from)`, with one launch per dtype where PyTorch can."""
    groups = {}
    for to, source in pairs:
        groups.setdefault(to.dtype, []).append((to, source))
    for group in groups.values():
        torch._foreach_copy_(*map(list, zip(*group, strict=True)))

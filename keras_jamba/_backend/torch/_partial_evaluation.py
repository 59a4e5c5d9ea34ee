"""Evaluation of the operations of a captured step that depend only on weights and constants, outside of the graph.

Such operations are casts of weights, `-exp(A_log)` and ranges of numbers. Each would be a kernel of every replay.
"""

import threading

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Larger results are computed in the graph: their memory may matter more than their time.
_MAX_BYTES = 2**20
_ATTEMPTS = 4
_of_thread = threading.local()


class PartialEvaluation:
    """The results of a function's operations that depend only on `weights` and constants.

    Args:
        weights: tensors whose values change only between calls of the function.
        constants: the `Constants` of the function.
        folds: whether to keep any results. The dispatcher of PyTorch must see all that the function writes.
    """

    def __init__(self, weights, constants, folds=True):
        self.weights, self.constants = weights, constants
        self.results, self.dynamic = {}, set() if folds else None

    def record(self, function):
        """Calls `function`, and keeps the results of these operations."""
        for _ in range(_ATTEMPTS):
            self.results = {}
            mode = _Recording(self)
            with mode:
                function()
            if not mode.overwritten:
                break
            # Another operation writes into these results, so the function must compute them anew.
            self.dynamic = self.dynamic | mode.overwritten
        else:
            self.results, self.dynamic = {}, None
        self.versions = self._versions()

    def replaying(self):
        """Returns a context in which the recorded operations return the kept results."""
        return _Replaying(self)

    def refresh(self, always=True):
        """Computes the kept results anew; unless `always`, if PyTorch has counted a change of the weights."""
        versions = self._versions()
        if always or versions is None or versions != self.versions:
            for result, again in self.results.values():
                result.copy_(again())
            self.versions = versions

    def _versions(self):
        # Tensors that were made in inference mode count no changes.
        return None if any(x.is_inference() for x in self.weights) else [x._version for x in self.weights]


def is_captured():
    """Returns whether this thread captures a step, or prepares a capture. It must not wait for the device."""
    return getattr(_of_thread, "mode", None) is not None


def are_constant(tensors):
    """Returns whether this thread replays, and no operation of the function computes any of the tensors."""
    mode = getattr(_of_thread, "mode", None)
    return isinstance(mode, _Replaying) and all(_memory(x) in mode.memory for x in tensors)


class _Mode(TorchDispatchMode):
    def __init__(self, evaluation):
        super().__init__()
        self.evaluation = evaluation
        self.memory = {_memory(x) for x in evaluation.weights}
        self.memory |= {_memory(result) for result, _ in evaluation.results.values()}

    def __enter__(self):
        _of_thread.mode = self
        return super().__enter__()

    def __exit__(self, *error):
        _of_thread.mode = None
        return super().__exit__(*error)

    def key(self, operation, args, kwargs):
        """Returns the key of an operation that depends only on weights and constants, else None."""
        if self.evaluation.dynamic is None or not _is_function(operation):
            return None
        leaves, structure = _pytree.tree_flatten((args, kwargs))
        described = []
        for x in leaves:
            if isinstance(x, torch.Tensor):
                if _memory(x) not in self.memory and _memory(x) not in self.evaluation.constants.memory:
                    return None
                described.append((x.data_ptr(), tuple(x.shape), x.stride(), x.dtype))
            else:
                described.append(repr(x))
        key = operation, structure, *described
        return None if key in self.evaluation.dynamic else key


class _Recording(_Mode):
    def __init__(self, evaluation):
        super().__init__(evaluation)
        self.overwritten, self.keys = set(), {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        key = self.key(operation, args, kwargs)
        results = self.evaluation.results
        if key is not None and key in results:
            return results[key][0]
        if operation._schema.is_mutable:
            self._note_overwritten(operation, args, kwargs)
        result = operation(*args, **kwargs)
        if key is not None and _can_keep(result) and _memory(result) not in self.memory:
            results[key] = result, lambda: operation(*args, **kwargs)
            self.memory.add(_memory(result))
            self.keys[_memory(result)] = key
        return result

    def _note_overwritten(self, operation, args, kwargs):
        for i, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                x = args[i] if i < len(args) else kwargs.get(argument.name)
                written = [_memory(y) for y in _pytree.tree_leaves(x) if isinstance(y, torch.Tensor)]
                self.overwritten |= {self.keys[y] for y in written if y in self.keys}


class _Replaying(_Mode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kept = self.evaluation.results.get(self.key(operation, args, kwargs))
        return operation(*args, **kwargs) if kept is None else kept[0]


def _memory(x):
    return x.untyped_storage().data_ptr()


def _is_function(operation):
    """Returns whether an operation computes its result from its arguments alone, and writes to none of them."""
    if operation._schema.is_mutable or torch.Tag.nondeterministic_seeded in operation.tags:
        return False
    # The values of these are undefined, until a kernel writes into them.
    return not operation._schema.name.startswith(("aten::empty", "aten::new_empty"))


def _can_keep(result):
    return isinstance(result, torch.Tensor) and 0 < result.untyped_storage().nbytes() <= _MAX_BYTES

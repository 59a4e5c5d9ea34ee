"""The weights of a model on JAX while `fit`, `evaluate` and `predict` run.

In each of these loops, Keras donates the values of the variables to the steps. A loop that ends early leaves a model
without weights, and other threads cannot read them. Here only training steps take the values, after the first batch
has been checked. The newest values are assigned back however the loop ends. Other threads read copies.
"""

import contextlib
import functools
import threading
import weakref
from typing import Any

import jax
import keras

from keras_jamba import _keras_internals

_NAMES = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
# Guards the two names below, and variables while their values are taken or read.
_lock = threading.Lock()
# Loops whose steps hold the values of variables.
_training: list[Any] = []
# The readers that may hold values of variables. An entry ends with its reader's frame, also after an interrupt.
_readers: weakref.WeakSet[Any] = weakref.WeakSet()


class _Reader:
    pass


class Loop:
    def __init__(self, kind):
        self.kind, self.checked, self.has_begun = kind, False, False
        self.thread, self.lock = threading.get_ident(), threading.RLock()
        # Variables and their newest values, by the names under which Keras passes them to its steps.
        self.variables, self.state, self.given, self.synced = {}, None, {}, True
        # `(logs, values)` of the last training step, until `collect`.
        self.results = []
        self._reading = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        kind, error, _ = exception
        try:
            self._end()
        except BaseException:
            # An interrupt: without the second call, the variables would stay without values.
            self._end()
            raise
        if error is not None and kind.__name__ == "IndivisibleError":
            raise ValueError(
                "The rows of every batch, including the last one, must be a multiple of the devices among which the "
                f"mesh splits them. Received: {str(error).splitlines()[0]} Choose another batch_size, or drop or pad "
                "the last batch, as training.Batches does with drop_last=True and training.PackedText by default."
            ) from error

    def _end(self):
        with self.lock:
            self.sync()
            self.state = None
        self._reading.close()

    def begin(self, model, names):
        """Returns the values for the first step of a loop, or the first one after callbacks have read the variables."""
        self.variables = {name: variables for name, variables in _variables(model).items() if name in names}
        flat = self._flat_variables()
        self.__dict__.pop("_ids", None)
        self._reading.close()
        values = iter(self._reading.enter_context(readable_values(flat)))
        self.given = {name: [next(values) for _ in variables] for name, variables in self.variables.items()}
        self.state, self.synced = self.given, False
        return tuple(self.given.values())

    def take(self, state):
        """Returns the values for a training step, which takes their memory. The variables hold none until `sync`."""
        if self in _training:
            return state
        self._reading.close()
        with _lock:
            if _readers:
                state = jax.tree.map(jax.numpy.copy, state)
            self.state = self.given = dict(zip(self.variables, state, strict=True))
            # First, so that `sync` restores the values after an interrupt of the next lines.
            _training.append(self)
            for variable in self._flat_variables():
                _keras_internals.release_tensor(variable)
        return state

    def put(self, state):
        self.state, self.synced = dict(zip(self.variables, state, strict=True)), False

    def collect(self):
        """Returns the result of the last training step after taking its values. An interrupted call can be repeated."""
        result = self.results[0]
        self.put(result[1])
        self.results = []
        return result

    def sync(self):
        if self.results:
            self.collect()
        if self.state is None or self.synced:
            return
        with self.lock:
            taken = self in _training
            for name, variables in self.variables.items():
                for variable, value, before in zip(variables, self.state[name], self.given[name], strict=True):
                    # A loop that only reads must not undo assignments of other threads.
                    if (taken or value is not before) and not value.is_deleted():
                        # A train_step of the user's may return another dtype, which `assign` casts, or shape.
                        if (value.dtype, value.shape) == (before.dtype, before.shape):
                            _keras_internals.store_tensor(variable, value)
                        else:
                            variable.assign(value)
            with _lock:
                if taken:
                    _training.remove(self)
            self.synced = True

    def _flat_variables(self):
        return [variable for variables in self.variables.values() for variable in variables]

    @functools.cached_property
    def _ids(self):
        return frozenset(map(id, self._flat_variables()))

    def copies(self):
        """Returns `{id(variable): copy of its newest value}`. Empty if the variables hold their values."""
        with self.lock:
            if self not in _training:
                return {}
            values = [value for name in self.variables for value in self.state[name]]
            return dict(zip(map(id, self._flat_variables()), map(jax.numpy.copy, values), strict=True))


def _variables(model):
    """Returns the variables of a model in Keras' lists, in the order of `_NAMES`."""
    properties = ("variables", "trainable_variables", "non_trainable_variables")
    if all(getattr(type(model), name) is getattr(keras.Model, name) for name in properties):
        # Keras walks all layers once per list.
        lists = [], []
        for variable in model.variables:
            lists[0 if model.trainable and variable.trainable else 1].append(variable)
    else:
        lists = list(model.trainable_variables), list(model.non_trainable_variables)
    optimizer = [] if model.optimizer is None else list(model.optimizer.variables)
    return dict(zip(_NAMES, (*lists, optimizer, list(model.metrics_variables)), strict=True))


@contextlib.contextmanager
def readable_values(variables):
    reader = _Reader()
    try:
        with _lock:
            _readers.add(reader)
        yield _values(variables)
    finally:
        with _lock:
            _readers.discard(reader)


def _values(variables):
    ids, copies, seen = frozenset(map(id, variables)), {}, []
    while True:
        with _lock:
            loops = [loop for loop in _training if not ids.isdisjoint(loop._ids)]
            if loops == seen:
                return [copies[id(v)] if id(v) in copies else v.value for v in variables]
        seen, copies = [], {}
        for loop in loops:
            if loop.thread == threading.get_ident():
                loop.sync()
            elif found := loop.copies():
                copies |= found
                seen.append(loop)


class TrainerLoops(_keras_internals.JaxTrainerHooks):
    @property
    def _loop_state(self):
        loop = self._this_loop()
        return None if loop is None or loop.synced else loop.state

    @_loop_state.setter
    def _loop_state(self, state):
        loop = self._this_loop()
        if loop is not None and state is not None:
            loop.state = state

    @property
    def _loop_state_synced(self):
        loop = self._this_loop()
        return loop is None or loop.synced

    @_loop_state_synced.setter
    def _loop_state_synced(self, synced):
        loop = self._this_loop()
        if loop is not None:
            loop.synced = synced

    def jax_state_sync(self):
        loop = self._this_loop()
        if loop is not None:
            loop.sync()

    def _first_loop_state(self, **wanted):
        loop = self._this_loop()
        if loop is None:
            return super()._first_loop_state(**wanted)
        return loop.begin(self, [name for name in _NAMES if wanted.get(name)])

    def _function_of_iterator(self, step_function, concatenate_outputs=False):
        def step(state, data):
            loop = self._this_loop()
            if loop is None or loop.kind not in ("fit", "train_on_batch"):
                return step_function(state, data)
            with loop.lock:
                # An interrupt arrives between two lines of Python code, when the list already has the result.
                loop.results.extend(map(step_function, (loop.take(state),), (data,)))
                return loop.collect()

        return super()._function_of_iterator(step, concatenate_outputs)

    def make_test_function(self, force=False):
        if self.test_function is None or force:
            self.test_function = self._function_of_iterator(self._reading_step(self.test_step, metrics=True))

    def make_predict_function(self, force=False):
        def predict_step(state, data):
            outputs, others = self.predict_step(state, data)
            return outputs, (state[0], others)

        if self.predict_function is None or force:
            step = self._reading_step(predict_step, metrics=False)
            self.predict_function = self._function_of_iterator(step, concatenate_outputs=True)

    def _reading_step(self, step, metrics):
        """Returns a compiled step that does not donate its state, and returns unchanged values as they are."""
        if self.run_eagerly or not self.jit_compile:
            return step
        shardings = None
        if keras.distribution.distribution() is not None:
            trainable, others, _, of_metrics = self._state_shardings()
            shardings = [*trainable, *others, *(of_metrics if metrics else [])]

        @jax.jit
        def program(state, data):
            result, found = step(state, data)
            both = enumerate(zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True))
            changed = {i: new for i, (new, before) in both if new is not before}
            if shardings is not None:
                changed = {i: jax.lax.with_sharding_constraint(x, shardings[i]) for i, x in changed.items()}
            return result, changed

        def run(state, data):
            result, changed = program(state, data)
            if not changed:
                return result, state
            values, structure = jax.tree.flatten(state)
            for i, value in changed.items():
                values[i] = value
            return result, jax.tree.unflatten(structure, values)

        return run

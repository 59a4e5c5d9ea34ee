"""States of layers: nested dicts of tensors, their continuation and their rollback."""

from typing import Any, NamedTuple

import keras
from keras import ops, tree

from keras_jamba._typing import Tensors
from keras_jamba.ops import _checks
from keras_jamba.ops._sharding import sharded_full
from keras_jamba.ops._tokens import NO_DOCUMENT, Documents, documents_of, first_tokens

# The axis of channels or heads, which a distribution may shard.
SPLIT_AXES = {"conv": 2, "ssm": 1, "key": 2, "value": 2}


class Leaf(NamedTuple):
    """Shape and dtype of a tensor of a state. None in the shape stands for any size."""

    shape: tuple
    dtype: str


def symbolic_state(specs):
    """Returns `{name: KerasTensor}` of `{name: Leaf}`, new ones: Keras identifies outputs of a layer by identity."""
    return {name: keras.KerasTensor(*leaf) for name, leaf in specs.items()}


def empty_state(specs):
    """Returns the state before the first token: zeros, and no document."""
    fill = {"document": NO_DOCUMENT}
    return {k: sharded_full(x.shape, fill.get(k, 0), x.dtype, SPLIT_AXES.get(k)) for k, x in specs.items()}


# Recurrent mixers: `MambaLayer` and `GatedConvLayer`


class SequenceState(NamedTuple):
    """The continuation of a state by a sequence of tokens.

    Attributes:
        initial: the state before the first token without its document id, or None for zeros.
        mask: `(b, t)` bool or None.
        documents: `(b, t)` int32, the document number of each token, or None for one document.
        joined: `Documents`, or None for one document.
        document_before: `(b,)` int32, the id of the document before the first token, or None without a state.
    """

    initial: dict | None
    mask: Any
    documents: Any
    joined: Documents | None
    document_before: Any

    @classmethod
    def begin(cls, state, mask, segment_ids, reset_mask, inputs):
        """Returns the `SequenceState` of `inputs` `(b, t, ...)` after `state`, or after None."""
        if state is None and segment_ids is None and reset_mask is None:
            return cls(None, mask, None, None, None)
        if state is None:
            initial, before = None, _no_document(inputs)
        else:
            initial, before = {name: x for name, x in state.items() if name != "document"}, state["document"]
        joined = documents_of(segment_ids, reset_mask, mask, before)
        if joined is None:
            return cls(initial, mask, None, None, before)
        initial = None if initial is None else joined.opening(initial)
        return cls(initial, mask, joined.numbers, joined, before)

    def final(self, state):
        """Returns the state after the tokens, with its document id; zeros in rows that end with a reset."""
        if self.joined is None:
            before = self.document_before
            return state | {"document": _no_document(*state.values()) if before is None else before}
        return self.joined.closing(state) | {"document": self.joined.last}


def _no_document(x, *_):
    """Returns NO_DOCUMENT for each row of `x` `(b, ...)`."""
    # Not `ops.full`: PyTorch would copy the constant to the device and synchronise.
    return ops.zeros(ops.shape(x)[:1], "int32") + NO_DOCUMENT


def check_has_state(layer):
    """Raises an error for a bidirectional layer, which has no state."""
    if layer.bidirectional:
        raise ValueError(
            f"A bidirectional {type(layer).__name__} has no state: it needs the complete sequence in one call. "
            "Received: bidirectional=True. Build the layer with bidirectional=False."
        )


def check_rollback_request(layer, initial_state, return_rollback_state):
    """Refuses `return_rollback_state` without a state to roll back to."""
    if return_rollback_state and initial_state is None:
        raise ValueError(
            f"A {type(layer).__name__} returns a rollback state only of tokens after a state. Received: "
            "return_rollback_state=True without a state. Pass init_cache(batch_size)."
        )


def recurrent_specs(direction, batch_size):
    """Returns `{name: Leaf}` of the state of a mixer whose direction is the layer `direction`."""
    leaves = direction.state_shapes(batch_size) | {"document": ((batch_size,), "int32")}
    return {name: Leaf(*leaf) for name, leaf in leaves.items()}


def reversed_in_time(direction, x, z, mask, segment_ids):
    """Returns the outputs of `direction` run from the last token to the first."""
    flip = lambda x: None if x is None else ops.flip(x, axis=1)  # noqa: E731
    return flip(direction(flip(x), flip(z), mask=flip(mask), segment_ids=flip(segment_ids)))


def rolled_back(direction, state_specs, rollback_state, count):
    """Returns the state of a mixer after only the first `count` tokens of a step; `direction` is its layer."""
    rollback_state = joined(rollback_state)
    _checks.check_rollback_state(rollback_state, direction.rollback_names)
    used, *tokens = kept_tokens(rollback_state, count)
    batch_size = used["x"].shape[0]
    # The documents follow the cache before the step: a row that keeps no token begins no document.
    cache = _checks.check_state("rollback_state['cache']", rollback_state["cache"], state_specs(batch_size))
    sequence = SequenceState.begin(cache, *tokens, used["x"])
    return sequence.final(direction.state_after(used, sequence.initial, sequence.mask, sequence.documents))


# Rollback


def joined(rollback_state):
    """Returns one rollback state for a list of consecutive ones; returns a single one unchanged."""
    if not isinstance(rollback_state, (list, tuple)):
        return rollback_state
    first, *more = rollback_state
    if not more:
        return first
    names = [sorted(each["tokens"]) if isinstance(each, dict) and "tokens" in each else None for each in rollback_state]
    if None in names or any(each != names[0] for each in names):
        raise ValueError(
            "Rollback states of consecutive steps must be of one kind. Received: "
            f"{names}. Pass mask, segment_ids and reset_mask to all of these steps, or to none."
        )
    tokens = {name: ops.concatenate([each["tokens"][name] for each in rollback_state], axis=1) for name in names[0]}
    return {"cache": first["cache"], "tokens": tokens}


def rollback_state_of(cache, mask, segment_ids, reset_mask, **tokens):
    """Returns the input of `rollback`: the cache before a step, and `(b, t, ...)` tensors of its tokens."""
    tokens |= dict(mask=mask, segment_ids=segment_ids, reset_mask=reset_mask)
    return {"cache": dict(cache), "tokens": {name: x for name, x in tokens.items() if x is not None}}


def kept_tokens(rollback_state, count):
    """Returns `(tokens, mask, segment_ids, reset_mask)` of a rollback state.

    The mask keeps the first `count` `(b,)` tokens of each row.
    """
    tokens = dict(rollback_state["tokens"])
    mask, segment_ids, reset_mask = (tokens.pop(name, None) for name in ("mask", "segment_ids", "reset_mask"))
    batch, length = next(iter(tokens.values())).shape[:2]
    count = _checks.check_count(count, batch, length)
    if reset_mask is not None:
        # Ignores resets at tokens that are not kept.
        reset_mask = first_tokens(count, reset_mask, length)
    return tokens, first_tokens(count, mask, length), segment_ids, reset_mask


def detach_state(state: Tensors) -> Tensors:
    """Returns the state without gradients, for truncated backpropagation through time.

    Args:
        state: state of a layer or model from `return_state=True`, or a cache: nested dicts of tensors.

    Returns:
        The same structure and values. No gradient flows through them, so that the activations of earlier tokens need no
        memory.

    Example:
        >>> import keras
        >>> from keras_jamba.layers import MambaLayer, detach_state
        >>> layer = MambaLayer(8)
        >>> first, state = layer(keras.random.normal((2, 5, 8)), return_state=True)
        >>> second = layer(keras.random.normal((2, 5, 8)), initial_state=detach_state(state))

    Reference:
        [Williams and Peng (1990)](https://doi.org/10.1162/neco.1990.2.4.490).
    """
    return tree.map_structure(ops.stop_gradient, state)

"""What is common to the states of all layers: plain nested dicts of tensors."""

from keras import ops, tree

from keras_jamba.ops import _checks
from keras_jamba.ops._sharding import filled
from keras_jamba.ops._tokens import NO_DOCUMENT, first_tokens

# The axis of channels or heads.
SPLIT_AXES = {"conv": 2, "ssm": 1, "key": 2, "value": 2}


def empty_state(specs):
    """The state before the first token: zeros, and no document."""
    fill = {"document": NO_DOCUMENT}
    return {k: filled(x.shape, fill.get(k, 0), x.dtype, SPLIT_AXES.get(k)) for k, x in specs.items()}


def joined(trail):
    """One trail of a list of those of steps one after the other; a trail itself stays what it is."""
    if not isinstance(trail, (list, tuple)):
        return trail
    first, *more = trail
    if not more:
        return first
    names = [sorted(each["tokens"]) if isinstance(each, dict) and "tokens" in each else None for each in trail]
    if None in names or any(each != names[0] for each in names):
        raise ValueError(
            "Trails of steps in a row must be of one kind. Received: "
            f"{names}. Give all of these steps a mask, segment_ids and a reset_mask, or none."
        )
    tokens = {name: ops.concatenate([each["tokens"][name] for each in trail], axis=1) for name in names[0]}
    return {"cache": first["cache"], "tokens": tokens}


def trail_of(cache, mask, segment_ids, reset_mask, **tokens):
    """What `rollback` needs of a step: the cache before it, and `(b, t, ...)` of its tokens, but for what is None."""
    tokens |= dict(mask=mask, segment_ids=segment_ids, reset_mask=reset_mask)
    return {"cache": dict(cache), "tokens": {name: x for name, x in tokens.items() if x is not None}}


def kept_tokens(trail, count):
    """`(tokens, mask, segment_ids, reset_mask)` of a trail, of which the first `count` tokens of each row are real."""
    tokens = dict(trail["tokens"])
    mask, segment_ids, reset_mask = (tokens.pop(name, None) for name in ("mask", "segment_ids", "reset_mask"))
    batch, length = next(iter(tokens.values())).shape[:2]
    count = _checks.check_count(count, batch, length)
    if reset_mask is not None:
        # A reset among the tokens that are taken back never happened.
        reset_mask = first_tokens(count, reset_mask, length)
    return tokens, first_tokens(count, mask, length), segment_ids, reset_mask


def detach_state(state):
    """The same state, through which no gradient flows: for truncated backpropagation through time.

    Args:
        state: what a layer or a model returned with `return_state=True`, or a cache: nested dicts of tensors.

    Returns:
        The same structure and values. Gradients end here: what came before costs no memory any more.

    Example:
        >>> from keras_jamba.layers import MambaLayer, detach_state
        >>> layer = MambaLayer(8)
        >>> first, state = layer(keras.random.normal((2, 5, 8)), return_state=True)
        >>> second = layer(keras.random.normal((2, 5, 8)), initial_state=detach_state(state))

    Reference:
        [Williams and Peng (1990)](https://doi.org/10.1162/neco.1990.2.4.490).
    """
    return tree.map_structure(ops.stop_gradient, state)

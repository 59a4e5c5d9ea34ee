"""Checks that ops and layers share. Every message gives the rule, the received value and the remedy."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from keras import backend, ops

from keras_jamba import _backend

_Constructor = TypeVar("_Constructor", bound=Callable[..., None])
_LARGEST = float(np.finfo("float32").max)


def check_shapes(tensors, letters):
    """Checks that every tensor has the axes of its letters, and that equal letters have equal sizes.

    A size that is unknown during tracing matches any size.

    Args:
        tensors: `{name: tensor}`.
        letters: `{name: one letter per axis}`.

    Raises:
        ValueError: if a shape does not match.
    """
    sizes = {}
    for name, x in tensors.items():
        shape, axes = tuple(x.shape), letters[name]
        fits = len(shape) == len(axes)
        for axis, size in zip(axes, shape, strict=False):
            if size is not None:
                fits = fits and sizes.setdefault(axis, size) == size
        if not fits:
            known = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
            raise ValueError(
                f"{name} must have the shape ({', '.join(axes)}) with {known}, the sizes of the tensors before it. "
                f"Received: {name}.shape={shape}. Check the order of the axes and which tensor is passed where."
            )


def host_array(x):
    """Returns the values of an array or tensor as a NumPy array, or None if reading them would block."""
    if isinstance(x, np.ndarray):
        return x
    return _backend.tensors.concrete_numpy(x) if ops.is_tensor(x) else None


def check_given(tensors, names):
    """Raises ValueError if one of the tensors `names` is None in `{name: tensor}`."""
    missing = [name for name in names if tensors[name] is None]
    if missing:
        raise ValueError(
            f"{', '.join(names)} must be tensors. Received: {missing[0]}=None. Only the other tensors may be left out."
        )


def check_floating(tensors):
    """Checks that every tensor of `{name: tensor}` has a floating-point dtype, or raises a `ValueError`."""
    for name, x in tensors.items():
        if not _backend.tensors.is_floating(x):
            dtype = backend.standardize_dtype(x.dtype)
            raise ValueError(
                f"{name} must be a floating-point tensor. Received: {name}.dtype={dtype}. "
                f"Convert it first, for example keras.ops.cast({name}, 'float32')."
            )


def check_tokens(mask, segment_ids, shape):
    """Returns `mask` as a bool tensor and `segment_ids` as an int32 tensor; None stays None.

    Raises:
        ValueError: if there is no token, if a shape differs from the `(b, t)` that `shape` begins with, if
            `mask` holds strings, or if `segment_ids` are not integers of at most 32 bits.
    """
    if shape[1] == 0:
        raise ValueError(
            f"There must be at least one token. Received: shape={tuple(shape)}. "
            "Skip the call: it would not change the state."
        )
    if mask is not None:
        mask = ops.convert_to_tensor(mask)
        _check_per_token("mask", mask, shape)
        if backend.standardize_dtype(mask.dtype) == "string":
            raise ValueError("mask must be bool. Received: mask.dtype=string. Use True for real tokens.")
        mask = ops.cast(mask, "bool")
    if segment_ids is not None:
        segment_ids = ops.convert_to_tensor(segment_ids)
        _check_per_token("segment_ids", segment_ids, shape)
        if not backend.is_int_dtype(segment_ids.dtype):
            raise ValueError(
                f"segment_ids must be integers. Received: segment_ids.dtype={segment_ids.dtype}. "
                "Number the documents of a row 0, 1, 2, ..."
            )
        _check_fits_32_bits(segment_ids)
        segment_ids = ops.cast(segment_ids, "int32")
    return mask, segment_ids


def check_token_ids(token_ids, vocab_size=None, counted=None, name="token_ids"):
    """Checks that token ids are integers from 0 to `vocab_size - 1`.

    Args:
        token_ids: a NumPy array of any shape. Without `vocab_size` it may be a tensor: the check reads only its dtype.
        vocab_size: the number of ids, or None to accept all integers.
        counted: bool of the same shape, False for padding, which may be any integer. None if there is no padding.
        name: the argument's name in the message about the dtype.

    Raises:
        ValueError: if the dtype is not an integer type or an id is out of range.
    """
    on_host = isinstance(token_ids, np.ndarray)
    dtype = token_ids.dtype if on_host else backend.standardize_dtype(token_ids.dtype)
    if not (dtype.kind in "iu" if on_host else backend.is_int_dtype(dtype)):
        raise ValueError(
            f"{name} must be integers. Received: shape={tuple(token_ids.shape)}, dtype={dtype}. Convert ids to int32, "
            "or tokenize the text first."
        )
    if vocab_size is None:
        return
    wrong = (token_ids < 0) | (token_ids >= vocab_size)
    wrong = wrong if counted is None else wrong & counted
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        # Padding can move an id within its row, so the message names only the row.
        place = f"at {list(where)}" if counted is None else f"in row {where[0]}"
        raise ValueError(
            f"Token ids must be from 0 to vocab_size - 1 = {vocab_size - 1}. Received: {int(token_ids[where])} "
            f"{place}. Tokenize with the model's own tokenizer, and mark padding with padding_mask."
        )


def check_window(window, sinks, prefix=""):
    """Checks a window of attention, an integer or None, and the number of first tokens that it does not hide.

    `prefix` comes before "window" and "sinks" in the names of the arguments.

    Raises:
        ValueError: if a value is out of range, or if there are sinks without a window.
    """
    if window is not None:
        check_integer(f"{prefix}window", window)
    check_integer(f"{prefix}sinks", sinks, at_least=0)
    if sinks and window is None:
        raise ValueError(
            f"{prefix}sinks need a window that they are exempt from. Received: {prefix}sinks={sinks}, "
            f"{prefix}window=None. Set {prefix}window."
        )


def check_sequence(mask, segment_ids, reset_mask, shape):
    """Returns `(mask, segment_ids, reset_mask)`: the first two as `check_tokens` does, `reset_mask` as bool or None.

    Raises:
        ValueError: as `check_tokens`, or if the shape of `reset_mask` is not `(b, t)`.
    """
    mask, segment_ids = check_tokens(mask, segment_ids, shape)
    if reset_mask is not None:
        reset_mask = ops.convert_to_tensor(reset_mask)
        _check_per_token("reset_mask", reset_mask, shape)
        reset_mask = ops.cast(reset_mask, "bool")
    return mask, segment_ids, reset_mask


def _check_fits_32_bits(segment_ids):
    """Checks the range if the values are on the host; other tensors pass unchecked."""
    ids = _backend.tensors.concrete_numpy(segment_ids)
    if ids is not None and ids.size and not -(2**31) < ids.min() <= ids.max() < 2**31:
        raise ValueError(
            f"segment_ids must fit into 32 bits. Received: values from {ids.min()} to {ids.max()}. "
            "Number the documents of a row 0, 1, 2, ..."
        )


def _check_per_token(name, x, shape):
    expected = tuple(shape[:2])
    fits = len(x.shape) == 2 and all(a is None or b is None or a == b for a, b in zip(x.shape, expected, strict=True))
    if not fits:
        raise ValueError(
            f"{name} must have the shape (b, t) = {expected} of the tokens. Received: {name}.shape={tuple(x.shape)}. "
            "Pass one value per token; masks of query-key pairs are not accepted here."
        )


def check_state(name, state, specs):
    """Returns the leaves of `state` as tensors.

    Raises:
        ValueError: if `state` is not a dict with the leaves, shapes and dtypes of `specs`.
    """
    have = set(state) if isinstance(state, dict) else None
    if have != set(specs):
        raise ValueError(
            f"{name} must be a dict with {sorted(specs)}. Received: {sorted(have) if have else type(state).__name__}. "
            "Pass what init_cache or an earlier call of this layer returned."
        )
    state = {leaf: _backend.tensors.as_tensor(x) for leaf, x in state.items()}
    for leaf, spec in specs.items():
        shape, dtype = tuple(state[leaf].shape), backend.standardize_dtype(state[leaf].dtype)
        fits = len(shape) == len(spec.shape) and dtype == spec.dtype
        pairs = zip(shape, spec.shape, strict=False)
        if not (fits and all(a is None or b is None or a == b for a, b in pairs)):
            raise ValueError(
                f"{name}[{leaf!r}] must have the shape {spec.shape} and the dtype {spec.dtype} of this layer and "
                f"batch. Received: shape={shape}, dtype={dtype}. Pass what init_cache or an earlier call of this "
                "layer returned."
            )
    return state


def check_rollback_state(rollback_state, tokens):
    """Checks that a step of this layer returned `rollback_state`: the cache before it, and `tokens` of that step.

    Args:
        rollback_state: a dict with `"cache"` and `"tokens"`.
        tokens: the names that `rollback_state["tokens"]` must have, besides masks and segment ids.

    Raises:
        ValueError: if keys are missing or unknown.
    """
    good = (
        isinstance(rollback_state, dict)
        and set(rollback_state) == {"cache", "tokens"}
        and isinstance(rollback_state["tokens"], dict)
    )
    have = set(rollback_state["tokens"]) if good else None
    if not good or not set(tokens) <= have <= {*tokens, "mask", "segment_ids", "reset_mask"}:
        raise ValueError(
            f"rollback_state must come from a step of this layer and have {sorted(tokens)} in its tokens. "
            f"Received: {sorted(have) if good else type(rollback_state).__name__}. Pass the last rollback_state of "
            "step(..., return_rollback_state=True)."
        )


def check_count(count, batch, length):
    """Returns `count` as `(b,)` int32: how many of the `length` tokens of a step each row keeps.

    Raises:
        ValueError: if the shape or dtype is wrong, or if a value that is on the host is out of range.
    """
    count = ops.convert_to_tensor(count)
    known = tuple(count.shape) == (batch,) or batch is None and len(count.shape) == 1
    if not known or not backend.is_int_dtype(count.dtype):
        raise ValueError(
            f"count must be integers of shape (b,) = ({batch},), one per row. Received: shape="
            f"{tuple(count.shape)}, dtype={backend.standardize_dtype(count.dtype)}. For two rows pass [0, 3]."
        )
    values = _backend.tensors.concrete_numpy(count)
    if values is not None and values.size and not 0 <= values.min() <= values.max() <= length:
        raise ValueError(
            f"count must be from 0 to the {length} tokens of the step. Received: count={values.tolist()}. "
            "To take back more tokens, pass a list with the rollback_states of several steps in order."
        )
    return ops.cast(count, "int32")


def python_numbers(constructor: _Constructor) -> _Constructor:
    """Returns the constructor with NumPy numbers converted to Python numbers, which a config stores as JSON."""
    plain = lambda x: x.item() if isinstance(x, np.generic) else x  # noqa: E731

    @functools.wraps(constructor)
    def with_python_numbers(self, *args, **kwargs):
        constructor(self, *map(plain, args), **{name: plain(x) for name, x in kwargs.items()})

    found: Any = with_python_numbers
    # Keras reads argument names without following `__wrapped__`.
    found.__signature__ = inspect.signature(constructor)
    return found


def check_not_backwards(kwargs, name, remedy):
    """Refuses `go_backwards`, which `keras.layers.Bidirectional` adds to a layer's config."""
    if "go_backwards" in kwargs:
        raise ValueError(
            f"{name} must not be wrapped in keras.layers.Bidirectional: it has its own bidirectional mode. "
            f"Received: go_backwards={kwargs['go_backwards']}. Remove the wrapper and pass {remedy}."
        )


def check_integer(name, value, at_least=1):
    """Checks that `value` is an integer of at least `at_least`, or raises a `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
        raise ValueError(
            f"{name} must be an integer of at least {at_least}. Received: {name}={value!r}. "
            f"Pass a value such as {name}={max(at_least, 1)}."
        )


def check_number(name, value, low, high=float("inf")):
    """Checks that `value` is a number from `low` to `high`, and finite in float32, or raises a `ValueError`."""
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high
    good = good and abs(value) <= _LARGEST
    if not good:
        bounds = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}, and finite"
        raise ValueError(f"{name} must be a number {bounds}. Received: {name}={value!r}. Pass a value in that range.")


def check_choice(name, value, choices):
    """Checks that `value` is one of `choices`, or raises a `ValueError`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}. Received: {name}={value!r}. Pass one of these.")


def check_last_axis(layer, shape, size):
    """Checks that the input of `layer` has the shape `(b, t, size)`, or raises a `ValueError`."""
    if len(shape) != 3 or shape[-1] != size:
        raise ValueError(
            f"The input of {layer} must have the shape (b, t, {size}). Received: shape={tuple(shape)}. "
            f"Reshape the input, or build the layer with another d_model."
        )

"""Readers of config.json fields, with defaults and checks."""

import numbers

import numpy as np

_LARGEST = float(np.finfo("float32").max)


def field(config, name, default):
    return config.get(name, default)


def integer(config, name, default, at_least=1):
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
        raise ValueError(
            f"{name} in config.json must be an integer of at least {at_least}. Received: {value!r}. "
            "Check the file: it may belong to another kind of model, or be damaged."
        )
    return int(value)


def number(config, name, default):
    """Returns a field as a float; raises ValueError unless it is a finite number of at least 0."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= _LARGEST:
        raise ValueError(
            f"{name} in config.json must be a finite number of at least 0. Received: {value!r}. Check the file: it may "
            "be damaged."
        )
    return float(value)


def flag(config, name, default):
    """Returns a field as a bool; raises ValueError unless it is true, false, 1, 0 or null."""
    value = config.get(name, default)
    if value is not None and (not isinstance(value, int) or value not in (0, 1)):
        raise ValueError(
            f"{name} in config.json must be true or false. Received: {value!r}. Check the file: it may be damaged."
        )
    return bool(value)


def rank_and_alpha(rank, lora_alpha):
    """Returns the rank and alpha of adapters; raises ValueError unless they are an integer and a finite number."""
    good = type(rank) is int and type(lora_alpha) in (int, float) and rank >= 1
    if not good or not 0 < lora_alpha <= _LARGEST:
        raise ValueError(
            "Adapters must have an integer rank of at least 1 and a finite lora_alpha above 0. Received: "
            f"rank={rank!r}, lora_alpha={lora_alpha!r}. Save them again."
        )
    return rank, float(lora_alpha)


def check_value(config, name, default, known, reader="keras_jamba"):
    value = config.get(name, default)
    if value not in known:
        raise ValueError(
            f"{reader} supports only {name}={' or '.join(map(repr, known))}. Received: {name}={value!r}. "
            "Convert a model with a supported value."
        )


def special_tokens(config, **defaults):
    """Returns `{"pad_token_id": ...}` for each keyword, such as `pad`, with its default.

    Raises:
        ValueError: for a field that is neither None nor an integer, nor a list of integers for `eos`.
    """
    found = {f"{name}_token_id": config.get(f"{name}_token_id", default) for name, default in defaults.items()}
    for name, value in found.items():
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        if not all(x is None or type(x) is int for x in ids):
            raise ValueError(
                f"{name} in config.json must be a token id. Received: {value!r}. Check the file: it may be damaged."
            )
    return found

"""Fields of a config.json: values with defaults, checked."""

import numbers


def field(config, name, default):
    return config.get(name, default)


def integer(config, name, default, at_least=1):
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
        raise ValueError(
            f"{name} in config.json must be an integer of at least {at_least}. Received: {value!r}. "
            "Check the file: it may be of another kind of model, or damaged."
        )
    return int(value)


def check_value(config, name, default, known, theirs="keras_jamba"):
    value = config.get(name, default)
    if value not in known:
        raise ValueError(
            f"{theirs} knows {name} as {' or '.join(map(repr, known))} alone. Received: {name}={value!r}. "
            "A model that differs in this cannot be converted."
        )


def special_tokens(config, **defaults):
    """`{"pad_token_id": ...}` and so on."""
    return {f"{name}_token_id": config.get(f"{name}_token_id", default) for name, default in defaults.items()}

"""The identity of a training in a save: its model, arguments, optimizer and kinds of variables, and their comparison.

Shapes alone do not tell a momentum from a mean of squared gradients, or two heads from four.
"""

import json
import re

# These do not change a model's outputs for given weights and inputs. Batches of other shapes or pixels are refused by
# the model itself.
_TRAINING = {"dropout", "drop_path", "gradient_checkpointing", "balance_loss", "balance_coefficient", "balance_over"}
_TRAINING |= {"squared_z_loss", "z_coefficient"}
_DATA = {"class_names", "pixel_range", "image_shape", "bos_token_id", "eos_token_id", "pad_token_id"}
# The number, kinds and shapes of variables show these. Several values, such as None and the default, may be equal.
_VARIABLES = {"d_ff", "dt_rank", "num_kv_heads", "mamba_ratio", "attention_offset", "moe_frequency", "moe_offset"}
_LAYER = {"name", "dtype", "trainable"}
_FREE = _TRAINING | _DATA | _VARIABLES | {"transformers_config"}


def of_training(model, variables):
    """Returns the entries of a save's state that identify a training.

    Args:
        model: a compiled model whose optimizer is built.
        variables: the variables of model, optimizer and metrics, in the order of the save.

    Returns:
        A dict for JSON: `"model"` and `"optimizer"`, the names of their classes; `"arguments"`, `{name: value}` of the
        constructor arguments that change outputs, empty for models of other libraries; and `"kinds"`, one name per
        variable, such as "kernel" or "momentum".
    """
    optimizer = model.optimizer
    # The optimizer that scales the loss has another one inside.
    while getattr(optimizer, "inner_optimizer", None) is not None:
        optimizer = optimizer.inner_optimizer
    given = model.constructor_arguments() if hasattr(model, "constructor_arguments") else {}
    owners = {variable.path.replace("/", "_") for variable in model.variables}
    slots = {id(variable) for variable in model.optimizer.variables}
    return {
        "model": type(model).__name__,
        "arguments": _compared(given),
        "optimizer": type(optimizer).__name__,
        "kinds": [_kind(variable, owners if id(variable) in slots else ()) for variable in variables],
    }


def differences(saved, own, variables):
    """Returns how a training differs from a save, a list of texts.

    Args:
        saved: the state of the save. Only entries that it has are compared: earlier versions stored none.
        own: what `of_training` returned for the training.
        variables: the variables of the training.
    """
    found = [
        f"the {part} {own[part]} where {saved[part]} was saved"
        for part in ("model", "optimizer")
        if part in saved and saved[part] != own[part]
    ]
    arguments = saved.get("arguments", {})
    found += [
        f"{name}={value!r} where {name}={arguments[name]!r} was saved"
        for name, value in own["arguments"].items()
        if name in arguments and arguments[name] != value
    ]
    kinds = saved.get("kinds", own["kinds"])
    if not found and len(kinds) == len(own["kinds"]):
        pairs = zip(variables, own["kinds"], kinds, strict=True)
        found += [f"{v.path}, {kind!r} where {other!r} was saved" for v, kind, other in pairs if kind != other][:1]
    return found


def _compared(arguments):
    """Returns the arguments that are compared, as JSON returns them."""
    kept = {name: _plain(value) for name, value in arguments.items() if name not in _FREE}
    # Another library's values may have no form in JSON.
    return {name: value for name, (value, is_plain) in kept.items() if is_plain}


def _plain(value):
    """Returns a value as JSON returns it, and whether JSON can hold it. A router keeps its class and arguments."""
    if isinstance(value, dict) and isinstance(value.get("config"), dict):
        config = {name: x for name, x in value["config"].items() if name not in _FREE | _LAYER}
        value = {"class_name": value.get("class_name"), "config": config}
    try:
        return json.loads(json.dumps(value)), True
    except (RecursionError, TypeError, ValueError):
        return None, False


def _kind(variable, owners):
    """Returns the name of a variable without the counter of automatic names.

    `owners` are the paths of the model's variables with underscores. Keras puts one before the name of a slot.
    """
    words = variable.name.split("_")
    for i in range(len(words) - 1, 0, -1):
        if "_".join(words[:i]) in owners:
            return "_".join(words[i:])
    return re.sub("_[0-9]+$", "", variable.name)

"""Folders that transformers reads and writes: the kind of model, its configuration and its weights."""

import dataclasses
import logging
import math
from pathlib import Path

import keras
import numpy as np

from keras_jamba import _files
from keras_jamba.converters import jamba, mamba1, peft, safetensors_folder
from keras_jamba.converters._fields import check_value, integer
from keras_jamba.converters.safetensors_folder import SafetensorsFolder
from keras_jamba.presets import STATISTICS

CONFIG = "config.json"
_HEAD, _TIED_HEAD = "score.weight", "lm_head.weight"
KINDS = {kind.MODEL_TYPE: kind for kind in (jamba, mamba1)}
_logger = logging.getLogger("keras_jamba")
# Fields of config.json that describe files and versions, not the model.
_ABOUT_FILES = ("architectures", "dtype", "torch_dtype", "transformers_version", "auto_map")


def is_foreign(folder):
    """Returns whether transformers wrote the config.json of a folder."""
    return "model_type" in _read_config(folder)


def warn_of_adapters(folder):
    """Warns if the folder of a checkpoint has PEFT adapters, which transformers would load with it."""
    if (Path(folder) / peft.CONFIG).is_file():
        _logger.warning(
            "The checkpoint %r has adapters beside it, %s, which transformers loads with it. Call "
            "model.load_lora(%r) to load them.",
            str(folder),
            peft.CONFIG,
            str(folder),
        )


def read(folder, class_name):
    """Reads the config.json of a checkpoint.

    Returns:
        `(kind, arguments)`: the converter module, and the constructor arguments of the model.

    Raises:
        ValueError: if the model_type is unknown, or has no model of class `class_name`.
    """
    config = _read_config(folder)
    kind = KINDS.get(config["model_type"]) if isinstance(config["model_type"], str) else None
    if kind is None or class_name not in kind.ARCHITECTURES:
        known = [name for name, kind in KINDS.items() if class_name in kind.ARCHITECTURES]
        raise ValueError(
            f"{class_name} loads checkpoints of model_type {known}. Received: {str(folder)!r} with "
            f"model_type={config['model_type']!r}. Load another checkpoint."
        )
    arguments = kind.arguments(config) | {"transformers_config": config}
    if class_name == "JambaClassifier":
        del arguments["tie_embeddings"]
        arguments["num_classes"] = _class_count(config)
    return kind, arguments


def _class_count(config):
    labels = config.get("id2label") or {}
    check_value({"id2label": type(labels).__name__}, "id2label", "dict", ("dict",))
    if set(labels) != {str(i) for i in range(len(labels))}:
        raise ValueError(
            f"id2label in config.json must name the classes 0 to n - 1. Received: {list(labels)[:5]}. Check the file: "
            "it may be damaged."
        )
    return len(labels) or integer(config, "num_labels", 2)


def load(folder, kind, arguments, pattern, make, assigners, keep_head):
    """Builds a model and loads the weights of a checkpoint.

    Args:
        folder: folder of the checkpoint.
        kind, arguments: the result of `read`.
        pattern: `pattern(arguments)` returns the block pattern of the model.
        make: `make(paths)` builds the model, whose variables of these paths need no initial values. It is called
            after all names and shapes have been checked.
        assigners: `assigners(model)` returns `{path: function}`. Each function assigns the value of one weight.
        keep_head: whether a classifier takes its head from the checkpoint, if the checkpoint has one.

    Returns:
        The model.

    Raises:
        ValueError: if a tensor is missing, unexpected, of another shape, or holds NaN or infinity.
    """
    with SafetensorsFolder(folder, kind.unstacked) as files:
        return _loaded(files, kind, arguments, pattern, make, assigners, keep_head)


def _loaded(files, kind, arguments, pattern, make, assigners, keep_head):
    """Returns the model with the weights of open files. See `load`."""
    _check_count(files, arguments)
    weights = list(kind.weights(arguments, pattern(arguments)))
    optional = (_TIED_HEAD,) if arguments.get("tie_embeddings") else ()
    if "num_classes" in arguments and not (keep_head and _HEAD in files.places):
        weights, optional = [w for w in weights if w.names != (_HEAD,)], (_TIED_HEAD, _HEAD)
        name = str(files.folder)
        _logger.warning("The checkpoint %r has no head for this task: it starts from random weights.", name)
    files.check(weights, optional)
    if arguments.get("tie_embeddings"):
        _check_tied(files, weights[0].names[0])
    paths = {weight.path for weight in weights}
    model = make(paths)
    # Paths of checkpoints omit the model's name.
    assign = {path.removeprefix(f"{model.name}/"): give for path, give in assigners(model).items()}
    _check_filled(files.folder, assign, paths, head_is_new="num_classes" in arguments)
    # A quantized matrix is rounded from any range.
    dtypes = {v.path.removeprefix(f"{model.name}/"): keras.backend.standardize_dtype(v.dtype) for v in model.weights}
    progress = keras.utils.Progbar(len(weights), unit_name="weight")
    for weight, value in files.values(weights):
        _check_range(value, dtypes[weight.path], weight.path, files.folder)
        assign[weight.path](value)
        progress.add(1)
    return model


def _check_range(value, dtype, path, folder):
    """Raises ValueError if a value of a checkpoint is infinite in the dtype of the model."""
    import ml_dtypes

    if "float" not in dtype:
        return
    limit = float(ml_dtypes.finfo(dtype).max)
    if float(ml_dtypes.finfo(value.dtype).max) > limit and value.size and np.abs(value).max() > limit:
        raise ValueError(
            f"Weights must be finite in the dtype of the model. Received: {path!r} of {str(folder)!r} with "
            f"{float(np.abs(value).max()):.3g}, which is infinite in {dtype}. Load it in a dtype of a larger range."
        )


def _check_count(files, arguments):
    """Checks the number of layers and experts in config.json against the number of tensors in the files.

    A damaged config.json may name any number, and the model must not be built with it.
    """
    layers = arguments["num_layers"]
    with_experts = layers // arguments["moe_frequency"] if arguments["moe_frequency"] else 0
    least = max(layers, with_experts * arguments["num_experts"])
    if least > len(files.places):
        raise ValueError(
            "A checkpoint must have a tensor for each layer and each expert at least. Received: "
            f"{str(files.folder)!r} with {len(files.places)} tensors, and a config.json with {layers} layers, "
            f"{with_experts} of them with {arguments['num_experts']} experts. They belong to different models, or one "
            "of them is damaged. Download the checkpoint again."
        )


def _check_filled(folder, variables, paths, head_is_new):
    """Raises ValueError unless the model and the checkpoint have the same weights."""
    expected = {path for path in variables if path.rsplit("/", 1)[-1] not in STATISTICS}
    expected -= {path for path in expected - paths if head_is_new and path.startswith("head/")}
    if expected != paths:
        raise ValueError(
            "The weights of a model must be those of its checkpoint. Received: "
            f"{str(folder)!r}, without {sorted(expected - paths)[:3]} and with additional "
            f"{sorted(paths - expected)[:3]}. Leave out the arguments that add or remove weights."
        )


def places(class_name, arguments, pattern):
    """Returns `(kind, weights)`: the converter module of a model, and the list of its `Weight` mappings.

    Raises:
        ValueError: if transformers has no such model.
    """
    kind = mamba1 if arguments["d_ff"] == 0 else jamba
    if class_name not in kind.ARCHITECTURES:
        raise ValueError(
            f"transformers has no {kind.MODEL_TYPE} for a {class_name}. Received: d_ff={arguments['d_ff']}. "
            "Build the model with feed-forward parts."
        )
    return kind, list(kind.weights(arguments, pattern))


def write(folder, class_name, arguments, pattern, variables, dtype, shard_bytes, include_tied_head=False):
    """Writes config.json and the tensors; see `JambaCausalLM.export_to_transformers`."""
    kind, weights = places(class_name, arguments, pattern)
    config = kind.config(arguments)
    _check_filled(folder, variables, {weight.path for weight in weights}, head_is_new=False)
    kept = {k: v for k, v in (arguments["transformers_config"] or {}).items() if k not in _ABOUT_FILES}
    config = kept | config | {"architectures": [kind.ARCHITECTURES[class_name]], "dtype": dtype}
    if "num_classes" in arguments:
        labels = kept.get("id2label") or {}
        if len(labels) != arguments["num_classes"]:  # the labels belong to another head
            labels = {str(i): f"LABEL_{i}" for i in range(arguments["num_classes"])}
        config |= {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
    _files.write_json(Path(folder) / CONFIG, config)
    dtype = _numpy_dtype(dtype)
    if include_tied_head and arguments.get("tie_embeddings"):
        weights.append(dataclasses.replace(weights[0], names=(_TIED_HEAD,)))
    sizes = {name: math.prod(weight.shape) * dtype.itemsize for weight in weights for name in weight.names}
    tensors = (
        (name, x.astype(dtype)) for weight in weights for name, x in weight.theirs(variables[weight.path]()).items()
    )
    safetensors_folder.write(folder, sizes, tensors, shard_bytes)


def _numpy_dtype(name):
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _read_config(folder):
    file = Path(folder) / CONFIG
    try:
        config = _files.read_json(file)
        good = isinstance(config, dict)
    except (ValueError, OSError) as error:
        raise ValueError(_no_config(file, repr(error))) from error
    if not good:
        raise ValueError(_no_config(file, type(config).__name__))
    return config


def _no_config(file, received):
    return (
        f"A checkpoint must have a {CONFIG} with one JSON object. Received: {str(file)!r}, {received}. "
        "Pass a folder that save_to_preset or transformers' save_pretrained wrote."
    )


def _check_tied(files, embedding):
    """Raises ValueError if a model with tied embeddings stores a head that differs from its embedding."""
    if _TIED_HEAD in files.places and not np.array_equal(files.read(_TIED_HEAD), files.read(embedding)):
        raise ValueError(
            f"With tie_word_embeddings the head must be the embedding. Received: a {_TIED_HEAD} that differs in "
            f"{str(files.folder)!r}. Set tie_word_embeddings to false in its config.json."
        )

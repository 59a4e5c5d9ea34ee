"""Adapter files: saves, loads and installs low-rank adapters."""

import json
import logging
import os
from pathlib import Path

import numpy as np
from keras import ops

from keras_jamba import _checksums, _files, _keras_internals
from keras_jamba.converters import _safetensors
from keras_jamba.converters._fields import rank_and_alpha
from keras_jamba.layers import lora
from keras_jamba.layers._lora_weights import ADAPTER, adaptable_layers, adapted_layers

FORMAT = "keras_jamba.lora.1"
_logger = logging.getLogger("keras_jamba")


def adapted(model):
    """Returns `{path without the model's name: layer}` of the layers with adapters.

    Raises:
        ValueError: if the model has no adapters.
    """
    lora.with_adapters(model)
    return {_path_in_model(model, each.path): each for _, each in adapted_layers(model)}


def pair(layer):
    """Returns the matrices `(d, r)` and `(r, f)` of a projection's adapter."""
    own = layer.own_variables()
    return tuple(ops.convert_to_numpy(own[f"kernel{suffix}"]) for suffix in ADAPTER)


def fully_trained_variables(model):
    """Returns `{path: variable}` of the trainable variables that are not adapters."""
    return {_path_in_model(model, v.path): v for v in model.trainable_weights if not lora.is_adapter(v)}


def save(model, file):
    """Writes the adapters and the fully trained variables of a model to a safetensors file.

    Raises:
        ValueError: if the model has no adapters, a value is not finite, or the path is a folder.
    """
    layers = adapted(model)
    tensors = {
        _path_in_model(model, v.path): v for layer in layers.values() for v in layer.weights if lora.is_adapter(v)
    }
    tensors = {
        path: np.array(ops.convert_to_numpy(v), "float32")
        for path, v in (tensors | fully_trained_variables(model)).items()
    }
    _check_finite(tensors, "a model", {})
    adapters = {path: [layer.lora_rank, layer.lora_alpha] for path, layer in layers.items()}
    metadata = {"format": FORMAT, "layers": json.dumps(adapters)}
    metadata[_checksums.KEY] = _checksums.of_arrays(tensors, metadata)
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"Adapters must be saved to a file. Received: {str(file)!r}, a folder. Add a file name.")
    with _files.atomic_file(file) as staged:
        _safetensors.write(tensors, staged, metadata)


def load(model, file):
    """Installs the adapters of a file that `save` wrote."""
    adapters, tensors = _read_file(Path(file))
    install(model, adapters, tensors, file)


def check_is_path(source):
    """Raises ValueError unless `source` is a path."""
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"Adapters must be the path of a file or folder. Received: {source!r}. Pass the path that save_lora wrote."
        )


def install(model, adapters, tensors, source):
    """Assigns adapters to a model, and adds them to its layers first where it has none.

    Args:
        model: a model with or without adapters.
        adapters: `{path of a layer: (rank, alpha)}`.
        tensors: `{path of a variable: array}`: two arrays per matrix of these layers, and the fully trained variables.
        source: origin of the adapters, for error messages.

    Raises:
        ValueError: if the adapters do not fit the model or are not finite. The model is not changed then.
    """
    layers = {_path_in_model(model, each.path): each for _, each in adaptable_layers(model)}
    expected = {}
    for path, (rank, _) in adapters.items():
        for name in layers[path].matrices() if path in layers else ():
            *stack, d, f = layers[path].matrix_shape(name)
            for suffix, shape in zip(ADAPTER, ((*stack, d, rank), (*stack, rank, f)), strict=True):
                expected[f"{path}/{name}{suffix}"] = shape
    weights = {_path_in_model(model, v.path): v for v in model.weights if not lora.is_adapter(v)}
    fully_trained = {path: tuple(weights[path].shape) for path in tensors if path in weights}
    found = {path: x.shape for path, x in tensors.items()}
    if found != expected | fully_trained or not set(adapters) <= set(layers):
        differ = {p for p in found.keys() | expected.keys() if found.get(p) != (expected | fully_trained).get(p)}
        raise ValueError(
            "Adapters must fit the layers of the model. Received: "
            f"{str(source)!r}, which differs in {sorted(differ | set(adapters) - set(layers))[:3]}. Load them into the "
            "model that they were trained with."
        )
    _check_finite(tensors, source, {path: variable.dtype for path, variable in weights.items()})
    have = {path: (layer.lora_rank, layer.lora_alpha) for path, layer in layers.items() if layer.lora_enabled}
    if have and have != {path: tuple(pair) for path, pair in adapters.items()}:
        raise ValueError(
            "Loaded adapters must have the layers, rank and lora_alpha of the model's own adapters. Received: "
            f"{str(source)!r} with {dict(list(adapters.items())[:2])}, and a model with "
            f"{dict(list(have.items())[:2])}. Call merge_lora, or load them into a model without adapters."
        )
    if not have:
        for path, pair in adapters.items():
            layers[path].enable_lora(*pair)
        lora.freeze(model, {id(layer): layer for layer in _leaf_layers(model, fully_trained)}.values())
    variables = {_path_in_model(model, v.path): v for v in model.weights}
    for path, x in tensors.items():
        variables[path].assign(x)


def _leaf_layers(model, paths):
    """Returns the layers without sublayers that own a variable of `paths`."""
    return [
        layer
        for layer in _keras_internals.sublayers(model, include_self=False)
        if any(_path_in_model(model, v.path) in paths for v in layer.weights)
        and not _keras_internals.direct_sublayers(layer)
    ]


def _read_file(file):
    """Returns `({layer path: (rank, alpha)}, {variable path: array})` of an adapter file."""
    damaged = _safetensors.library().SafetensorError
    try:
        with _safetensors.opened(file) as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a dict
        adapters = json.loads(metadata["layers"]) if metadata.get("format") == FORMAT else None
        adapters = {path: rank_and_alpha(*pair) for path, pair in adapters.items()}
        if not adapters:
            raise ValueError("no adapters")
        _check_checksum(tensors, metadata, file)
    # safetensors knows dtypes that NumPy does not.
    except (OSError, damaged, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"Adapters must be a file that save_lora wrote. Received: {str(file)!r}, {error!r}. Pass the path of a "
            "complete file."
        ) from error
    return adapters, tensors


def _check_checksum(tensors, metadata, file):
    """Raises ValueError if the arrays and metadata of a file do not match its checksum."""
    found = metadata.get(_checksums.KEY)
    if found is None:
        _logger.warning("%s was written without a checksum; save_lora adds one.", file)
    elif found != _checksums.of_arrays(tensors, {name: x for name, x in metadata.items() if name != _checksums.KEY}):
        raise ValueError("the values do not match their checksum")


def _check_finite(tensors, source, dtypes):
    """Raises ValueError for a value that is not finite in the dtype of its variable; float32 without one."""
    for name, x in tensors.items():
        if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
            raise ValueError(
                f"Adapters must be floating-point numbers. Received: {name!r} of {str(source)!r} in {x.dtype.name}. "
                "Save them again."
            )
        dtype = "float16" if dtypes.get(name) == "float16" else "float32"
        with np.errstate(over="ignore"):
            x = x.astype(dtype)
        if not np.isfinite(x).all():
            raise ValueError(
                f"Adapters must be finite. Received: {name!r} of {str(source)!r} with NaN or infinity. Use an "
                "earlier checkpoint of the training."
            )


def _path_in_model(model, path):
    """Returns the path of a variable or layer without the model's name."""
    return path.removeprefix(f"{model.name}/")

"""Adapters in files of their own."""

import json
from pathlib import Path

import numpy as np
from keras import ops

from keras_jamba import _files, _keras_internals
from keras_jamba.layers import lora
from keras_jamba.layers._lora_weights import ADAPTER
from keras_jamba.layers._quantizable import quantizable_layers

FORMAT = "keras_jamba.lora.1"


def adapted(model):
    """`{path without the model's name: layer}` of the layers with adapters; an error where there are none."""
    lora.with_adapters(model)
    return {_short(model, each.path): each for _, each in quantizable_layers(model) if each.lora_enabled}


def pair(layer):
    """The two matrices `(d, r)` and `(r, f)` of the adapter of a projection."""
    own = layer.own_variables()
    return tuple(ops.convert_to_numpy(own[f"kernel{suffix}"]) for suffix in ADAPTER)


def fully_trained_variables(model):
    """`{path: variable}` of what is trained beside the adapters."""
    return {_short(model, v.path): v for v in model.trainable_weights if not lora.is_adapter(v)}


def save(model, file):
    from safetensors.numpy import save_file

    layers = adapted(model)
    tensors = {_short(model, v.path): v for layer in layers.values() for v in layer.weights if lora.is_adapter(v)}
    tensors = {
        path: np.array(ops.convert_to_numpy(v), "float32")
        for path, v in (tensors | fully_trained_variables(model)).items()
    }
    _check_finite(tensors, "a model")
    adapters = {path: [layer.lora_rank, layer.lora_alpha] for path, layer in layers.items()}
    metadata = {"format": FORMAT, "layers": json.dumps(adapters)}
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"Adapters are written to a file. Received: {str(file)!r}, a folder. Add a name to it.")
    with _files.atomic_file(file) as staged:
        save_file(tensors, staged, metadata=metadata)


def load(model, file):
    adapters, tensors = _read(Path(file))
    install(model, adapters, tensors, file)


def install(model, adapters, tensors, source):
    """Gives a model adapters.

    Args:
        model: one with or without adapters.
        adapters: `{path of a layer: (rank, alpha)}`.
        tensors: `{path of a variable: array}`: two for each matrix of these layers, and what was trained whole.
        source: where they are from, for messages.

    Raises:
        ValueError: if they do not fit. Nothing is changed then.
    """
    layers = {_short(model, each.path): each for _, each in quantizable_layers(model)}
    expected = {}
    for path, (rank, _) in adapters.items():
        for name in layers[path].matrices() if path in layers else ():
            *stack, d, f = layers[path].matrix_shape(name)
            for suffix, shape in zip(ADAPTER, ((*stack, d, rank), (*stack, rank, f)), strict=True):
                expected[f"{path}/{name}{suffix}"] = shape
    weights = {_short(model, v.path): v for v in model.weights if not lora.is_adapter(v)}
    beside = {path: tuple(weights[path].shape) for path in tensors if path in weights}
    found = {path: x.shape for path, x in tensors.items()}
    if found != expected | beside or not set(adapters) <= set(layers):
        differ = {p for p in found.keys() | expected.keys() if found.get(p) != (expected | beside).get(p)}
        raise ValueError(
            "Adapters must fit the layers of the model. Received: "
            f"{str(source)!r}, which differs in {sorted(differ | set(adapters) - set(layers))[:3]}. Load them into the "
            "model that they were trained with."
        )
    _check_finite(tensors, source)
    have = {path: (layer.lora_rank, layer.lora_alpha) for path, layer in layers.items() if layer.lora_enabled}
    if have and have != {path: tuple(pair) for path, pair in adapters.items()}:
        raise ValueError(
            "Adapters take the place of others like them, of the same layers, rank and lora_alpha. Received: "
            f"{str(source)!r} with {dict(list(adapters.items())[:2])}, and a model with "
            f"{dict(list(have.items())[:2])}. Call merge_lora, or begin with a model without adapters."
        )
    if not have:
        for path, pair in adapters.items():
            layers[path].enable_lora(*pair)
        lora.freeze(model, {id(layer): layer for layer in _owners(model, beside)}.values())
    variables = {_short(model, v.path): v for v in model.weights}
    for path, x in tensors.items():
        variables[path].assign(x)


def _owners(model, paths):
    """The layers that weights belong to."""
    return [
        layer
        for layer in _keras_internals.sublayers(model, include_self=False)
        if any(_short(model, v.path) in paths for v in layer.weights) and not _inner(layer)
    ]


def _inner(layer):
    return _keras_internals.direct_sublayers(layer)


def _read(file):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no dict
        adapters = json.loads(metadata["layers"]) if metadata.get("format") == FORMAT else None
        adapters = {path: (int(rank), float(alpha)) for path, (rank, alpha) in adapters.items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Adapters must be a file that save_lora wrote. Received: {str(file)!r}, {error!r}. Pass the path of one "
            "that is whole."
        ) from error
    return adapters, tensors


def _check_finite(tensors, source):
    for name, x in tensors.items():
        if not np.isfinite(x).all():
            raise ValueError(
                f"Adapters must be finite. Received: {name!r} of {str(source)!r} with NaN or infinity. Take an "
                "earlier state of the training."
            )


def _short(model, path):
    return path.removeprefix(f"{model.name}/")

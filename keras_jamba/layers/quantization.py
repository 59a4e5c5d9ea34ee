"""Quantization of the weights of a layer or model to int8 or int4."""

from typing import Literal

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba.layers._quantizable import deferred_garbage_collection, quantizable_layers
from keras_jamba.ops import _checks

# Per mode: the storage of the projections of blocks, of experts' banks, and of the projection to logits.
QUANTIZATIONS = {
    "int8": {"projection": "int8", "bank": "int8", "head": "int8"},
    "int4": {"projection": "int4", "bank": "int4", "head": "int8"},
    "experts_int8": {"bank": "int8"},
}


def quantize(layer: keras.layers.Layer, mode: Literal["int8", "int4", "experts_int8"]) -> None:
    """Quantizes the matrices of a layer or model and of all its sublayers.

    These are the matrices of Mamba, attention, feed-forward and expert layers, and of the projection to logits.
    Routers, A_log, D, the projection and bias of the time step, convolutions, norms, embeddings and other layers stay
    in floating point, and so do activations. Quantization saves memory, and time where reading weights is the
    bottleneck. A layer that is not built yet creates quantized weights in `build`.

    Args:
        layer: a Keras layer or model.
        mode: `"int8"`, one scale per column; `"int4"`, one scale and one zero per 64 rows of a column, with the
            projection to logits in int8; `"experts_int8"`, int8 for experts only.

    Raises:
        ValueError: if the mode is unknown, no matrix can be quantized, a matrix is quantized already, or a layer
            computes in float16.

    Example:
        >>> import keras_jamba
        >>> layer = keras_jamba.layers.MambaLayer(16)
        >>> layer.build((None, None, 16))
        >>> keras_jamba.layers.quantize(layer, "int8")

    Reference:
        [Dettmers et al. (2022)](https://arxiv.org/abs/2208.07339); experts only:
        [Jamba-1.5 (2024)](https://arxiv.org/abs/2408.12570).
    """
    _checks.check_choice("mode", mode, tuple(QUANTIZATIONS))
    kinds = QUANTIZATIONS[mode]
    found = [each for _, each in quantizable_layers(layer) if each.KIND in kinds and not each.keeps_float]
    done = [each.path for each in found if each.quantization_mode]
    if done or not found:
        reason = f"{done[0]!r} of {layer.name!r}, which is quantized already" if done else f"{layer.name!r} without any"
        raise ValueError(
            f"mode={mode!r} needs layers in floating point of the kinds {sorted(kinds)}. Received: {reason}. "
            "Load or build the model again, or choose another mode."
        )
    if any(each.compute_dtype == "float16" for each in found):
        raise ValueError(
            "A layer with quantized weights cannot compute in float16: int8 products can overflow it. Received: "
            f"mode={mode!r} for {layer.name!r}, which computes in float16. Use bfloat16."
        )
    with deferred_garbage_collection():
        for each in found:
            if each.built:
                each.quantize(kinds[each.KIND])
            else:
                each.set_mode(kinds[each.KIND])
    _backend.trainer.on_weights_replaced(layer)


def float_shapes(model):
    """Returns `{path: shape}` of the weights of a model in floating point and without adapters."""
    layers = [layer for _, layer in quantizable_layers(model)]
    shapes = {f"{layer.path}/{name}": shape for layer in layers for name, shape in layer.float_shapes().items()}
    replaced = {v.path for layer in layers for v in layer.own_variables().values()}
    return {v.path: tuple(v.shape) for v in model.weights if v.path not in replaced} | shapes


def float_values(model):
    """Returns `{path: function}` of the same weights; each function returns a NumPy array in floating point."""
    found = {v.path: lambda v=v: ops.convert_to_numpy(v) for v in model.weights}
    for _, layer in quantizable_layers(model):
        for name in layer.matrices():
            found[f"{layer.path}/{name}"] = lambda layer=layer, name=name: layer.float_value(name)
    return {path: found[path] for path in float_shapes(model)}


def assigners(model):
    """Returns `{path: function}` of the same weights; each assigns a NumPy array and quantizes it if necessary."""
    found = {v.path: lambda value, v=v: _backend.tensors.fill(v, value) for v in model.weights}
    for _, layer in quantizable_layers(model):
        for name in layer.float_shapes():
            found[f"{layer.path}/{name}"] = lambda value, layer=layer, name=name: layer.assign_float(name, value)
    return {path: found[path] for path in float_shapes(model)}

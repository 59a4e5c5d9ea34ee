"""Weights in few bits: which layers of a model, in which mode."""

from keras import ops

from keras_jamba import _backend
from keras_jamba.layers._quantizable import deferred_garbage_collection, quantizable_layers
from keras_jamba.ops import _checks

# What each mode makes of the projections of blocks, of experts' banks, and of the projection to logits.
QUANTIZATIONS = {
    "int8": {"projection": "int8", "bank": "int8", "head": "int8"},
    "int4": {"projection": "int4", "bank": "int4", "head": "int8"},
    "experts_int8": {"bank": "int8"},
}


def quantize(layer, mode):
    """Stores the matrices of a layer or model, and of all layers inside, in few bits.

    Those of Mamba, attention, feed-forward and expert layers, and of the projection to logits. Routers, A_log, D, the
    projection and bias of the time step, convolutions, norms, embeddings, and layers of other kinds stay in floating
    point, and so do activations: what is saved is memory, and time where reading weights is what takes it. A layer
    without weights is built with few bits from the beginning.

    Args:
        layer: a Keras layer or model.
        mode: `"int8"`, a scale for each column; `"int4"`, a scale and a zero for each 64 rows of a column, logits
            in eight bits; `"experts_int8"`, experts alone.

    Raises:
        ValueError: for another mode, where nothing is there to be quantized, where something already is, and for
            layers that compute in float16.

    Example:
        >>> import keras_jamba
        >>> layer = keras_jamba.layers.MambaLayer(16)
        >>> layer.build((None, None, 16))
        >>> keras_jamba.layers.quantize(layer, "int8")

    Reference:
        [Dettmers et al. (2022)](https://arxiv.org/abs/2208.07339); experts alone:
        [Jamba-1.5 (2024)](https://arxiv.org/abs/2408.12570).
    """
    _checks.check_choice("mode", mode, tuple(QUANTIZATIONS))
    kinds = QUANTIZATIONS[mode]
    found = [each for _, each in quantizable_layers(layer) if each.KIND in kinds and not each.keeps_float]
    done = [each.path for each in found if each.quantization_mode]
    if done or not found:
        what = f"{done[0]!r}, which is in {layer.name!r} already" if done else f"{layer.name!r} without any"
        raise ValueError(
            f"mode={mode!r} is for layers in floating point, of the kinds {sorted(kinds)}. Received: {what}. "
            "Load or build the model anew, or choose another mode."
        )
    if any(each.compute_dtype == "float16" for each in found):
        raise ValueError(
            "Products with whole numbers of eight bits can be beyond what float16 holds. Received: "
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
    """`{path: shape}` of the weights of a model as they would be in floating point and without adapters."""
    inner = [layer for _, layer in quantizable_layers(model)]
    compact = {f"{layer.path}/{name}": shape for layer in inner for name, shape in layer.float_shapes().items()}
    theirs = {v.path for layer in inner for v in layer.own_variables().values()}
    return {v.path: tuple(v.shape) for v in model.weights if v.path not in theirs} | compact


def float_values(model):
    """`{path: function}` of the same weights: as NumPy arrays in floating point."""
    found = {v.path: lambda v=v: ops.convert_to_numpy(v) for v in model.weights}
    for _, layer in quantizable_layers(model):
        for name in layer.matrices():
            found[f"{layer.path}/{name}"] = lambda layer=layer, name=name: layer.float_value(name)
    return {path: found[path] for path in float_shapes(model)}


def assigners(model):
    """`{path: function}` of the same weights, to give each its value, which is rounded where it is in few bits."""
    found = {v.path: v.assign for v in model.weights}
    for _, layer in quantizable_layers(model):
        for name in layer.float_shapes():
            found[f"{layer.path}/{name}"] = lambda value, layer=layer, name=name: layer.assign_float(name, value)
    return {path: found[path] for path in float_shapes(model)}

"""Low-rank adapters: choice of projections, trained layers, and merging into the weights."""

import math
from collections.abc import Iterable

import keras

from keras_jamba import _backend, _keras_internals
from keras_jamba.layers._lora_weights import adaptable_layers, adapted_layers
from keras_jamba.layers._quantizable import QuantizableWeights, deferred_garbage_collection, quantizable_layers
from keras_jamba.layers.attention import AttentionLayer
from keras_jamba.layers.feed_forward import FeedForward
from keras_jamba.layers.gated_conv import GatedConvLayer
from keras_jamba.layers.mamba import MambaLayer
from keras_jamba.layers.moe import MoELayer
from keras_jamba.layers.quantization import float_shapes

# Layer classes and the names of their projections.
TARGETS = {
    "attention": (AttentionLayer, ("q_proj", "k_proj", "v_proj", "out_proj")),
    "mamba": (MambaLayer, ("in_proj", "x_proj", "dt_proj", "out_proj")),
    "gated_conv": (GatedConvLayer, ("in_proj", "out_proj")),
    "feed_forward": (FeedForward, ("gate_proj", "up_proj", "down_proj")),
    "experts": (MoELayer, ()),
}
_CHOICES = (*TARGETS, *(f"{kind}.{name}" for kind, (_, names) in TARGETS.items() for name in names))


def enable_lora(
    layer: keras.layers.Layer,
    rank: int,
    targets: str | Iterable[str] | None = None,
    lora_alpha: float | None = None,
    also_train: str | Iterable[str] = (),
) -> dict[str, float]:
    """Adds low-rank adapters to the projections of a layer or model, and freezes all other weights.

    The function prints the number of trained weights. The optimizer of an already trained model restarts. During
    training, save with `keras_jamba.training.Checkpoint` or `ModelCheckpoint(save_weights_only=True)`. Adapters of
    projections cost little in a decoding step. Adapters of experts are multiplied out: merge them before decoding.

    Args:
        layer: a built Keras layer or model; its weights may be quantized.
        rank: width of the adapters.
        targets: projections that get adapters: `"attention"` (q, k, v, out), `"mamba"` (in, x, dt, out),
            `"gated_conv"`, `"feed_forward"`, `"experts"` (all banks, one adapter per expert), or one projection, for
            example `"mamba.in_proj"`; a string or a list. None means all mixers: attention, mamba and gated_conv.
        lora_alpha: numerator of the scale `lora_alpha / rank` of an adapter's product; None means rank.
        also_train: names of layers that train completely, for example a new `"head"`; a name selects all layers
            that have it.

    Returns:
        `{"trained": count, "weights": count, "share": trained / weights}`.

    Raises:
        ValueError: if a target or layer is unknown or absent, a number is out of range, or a layer has adapters
            already or no weights.

    Example:
        >>> import keras_jamba
        >>> model = keras_jamba.DHCJamba.from_preset("digits")
        >>> share = model.enable_lora(4, also_train="head")["share"]
        Adapters of rank 4 beside 8 matrices: 4,482 of 134,143 weights are trained, 3.34%.

    Reference:
        [Hu et al. (2021)](https://arxiv.org/abs/2106.09685); on Mamba:
        [Galim et al. (2024)](https://arxiv.org/abs/2410.09016).
    """
    also_train = [also_train] if isinstance(also_train, str) else list(also_train)
    adapted = _targeted(layer, targets)
    fully_trained = _named(layer, also_train)
    for each in adapted:
        each.check_lora(rank, lora_alpha)
    for each in adapted:
        each.enable_lora(rank, lora_alpha)
    freeze(layer, fully_trained)
    return print_trainable_parameters(layer)


def freeze(layer, fully_trained=()):
    """Makes the adapters and the layers `fully_trained` trainable, and freezes all other weights."""
    trained = {id(inner) for each in fully_trained for inner in _keras_internals.sublayers(each)}
    thaw(layer)
    for each in _keras_internals.sublayers(layer):
        if id(each) in trained:
            continue
        if not (isinstance(each, QuantizableWeights) or _keras_internals.direct_sublayers(each)):
            # A flag on the layer, not on its variables, so that batch norm keeps its statistics.
            each.trainable = False
            continue
        for variable in _keras_internals.own_variables(each)[0]:
            variable.trainable = is_adapter(variable)
    _backend.trainer.on_weights_replaced(layer)


def thaw(layer):
    """Makes a layer and all its sublayers trainable."""
    # TensorFlow ignores an unchanged value, hence two assignments.
    layer.trainable = False
    layer.trainable = True


def print_trainable_parameters(layer):
    """Prints and returns the number of trained weights."""
    trained = sum(math.prod(v.shape) for v in layer.trainable_variables)
    adapted = [each for _, each in adapted_layers(layer)]
    count = sum(len(each.matrices()) for each in adapted)
    weights = sum(map(math.prod, float_shapes(layer).values())) + trained
    print(
        f"Adapters of rank {adapted[0].lora_rank} beside {count} matrices: {trained:,} of {weights:,} weights are "
        f"trained, {trained / weights:.2%}."
    )
    return {"trained": trained, "weights": weights, "share": trained / weights}


def merge_lora(layer: keras.layers.Layer) -> None:
    """Adds all adapters to their matrices, removes them, and makes all weights trainable.

    The outputs of the layer stay equal up to rounding. Quantized matrices are quantized again.

    Raises:
        ValueError: if the layer has no adapters.
    """
    with deferred_garbage_collection():
        for each in with_adapters(layer):
            each.merge_lora()
    thaw(layer)
    _backend.trainer.on_weights_replaced(layer)


def with_adapters(layer):
    """Returns the layers that have adapters.

    Raises:
        ValueError: if no layer has adapters.
    """
    found = [each for _, each in adapted_layers(layer)]
    if not found:
        raise ValueError(f"There must be adapters. Received: {layer.name!r} without any. Call enable_lora first.")
    return found


def is_adapter(variable):
    """Returns whether a variable belongs to an adapter."""
    return variable.name.endswith(("_lora_a", "_lora_b"))


def _targeted(layer, targets):
    """Returns the `LoraWeights` layers that `targets` name."""
    requested = ("attention", "mamba", "gated_conv") if targets is None else targets
    requested = (requested,) if isinstance(requested, str) else tuple(requested)
    found = {}
    for target in requested:
        if target not in _CHOICES:
            raise ValueError(
                f"targets must be among {list(_CHOICES)}. Received: {target!r}. Pass one or several of these."
            )
        matching = {id(each): each for each in _of_kind(layer, *target.partition(".")[::2])}
        if not matching and targets is not None:
            raise ValueError(
                f"A target must be in the model. Received: {target!r}, which is not in {layer.name!r}. Leave it out."
            )
        found |= matching
    if not found:
        raise ValueError(
            f"The layer must have a target. Received: {layer.name!r}, without mixers. Choose other targets."
        )
    return list(found.values())


def _of_kind(layer, kind, projection):
    """Yields the targets of one kind in `layer`; a non-empty `projection` selects the targets of this name."""
    cls, projections = TARGETS[kind]
    for owner in _keras_internals.sublayers(layer):
        if isinstance(owner, cls):
            for path, each in adaptable_layers(owner):
                name = path.rpartition("/")[2]
                if not projections or name in ([projection] if projection else projections):
                    yield each


def _named(layer, names):
    """Returns the sublayers with one of these names; none of them may be quantized."""
    sublayers = list(_keras_internals.sublayers(layer, include_self=False))
    known = {each.name for each in sublayers}
    for name in names:
        if name not in known:
            raise ValueError(
                f"also_train must name layers of {layer.name!r}, {sorted(known)[:20]}. Received: {name!r}. "
                "Pass the name of one of them."
            )
    found = [each for each in sublayers if each.name in names]
    quantized = [inner.path for each in found for _, inner in quantizable_layers(each) if inner.quantization_mode]
    if quantized:
        raise ValueError(
            f"The layers of also_train must be in floating point. Received: also_train={names}, where {quantized[0]!r} "
            "is quantized. Add an adapter to it, or load the model in floating point."
        )
    return found

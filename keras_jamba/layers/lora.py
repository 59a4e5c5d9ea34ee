"""Low-rank adapters: beside which projections, what else is trained, and back into the weights."""

import math

from keras_jamba import _backend, _keras_internals
from keras_jamba.layers._quantizable import QuantizableWeights, deferred_garbage_collection, quantizable_layers
from keras_jamba.layers.attention import AttentionLayer
from keras_jamba.layers.feed_forward import FeedForward
from keras_jamba.layers.gated_conv import GatedConvLayer
from keras_jamba.layers.mamba import MambaLayer
from keras_jamba.layers.moe import MoELayer
from keras_jamba.layers.quantization import float_shapes

# Kinds of layers, and their projections.
TARGETS = {
    "attention": (AttentionLayer, ("q_proj", "k_proj", "v_proj", "out_proj")),
    "mamba": (MambaLayer, ("in_proj", "x_proj", "dt_proj", "out_proj")),
    "gated_conv": (GatedConvLayer, ("in_proj", "out_proj")),
    "feed_forward": (FeedForward, ("gate_proj", "up_proj", "down_proj")),
    "experts": (MoELayer, ()),
}
_CHOICES = (*TARGETS, *(f"{kind}.{part}" for kind, (_, parts) in TARGETS.items() for part in parts))


def enable_lora(layer, rank, targets=None, lora_alpha=None, also_train=()):
    """Puts low-rank adapters beside the projections of a layer or model, and freezes everything else.

    What is trained is printed. The optimizer of a model that was trained before begins anew. Save in a training by
    `keras_jamba.training.Checkpoint` or `ModelCheckpoint(save_weights_only=True)`. In a step of decoding adapters cost
    little beside projections, but those of experts are multiplied out: merge them for that.

    Args:
        layer: a Keras layer or model with weights; they may be in few bits.
        rank: width of the adapters.
        targets: which projections: `"attention"` (q, k, v, out), `"mamba"` (in, x, dt, out), `"gated_conv"`,
            `"feed_forward"`, `"experts"` (all banks, an adapter for each expert), or one kind of projection, for
            example `"mamba.in_proj"`; several in a list. None for all mixers: attention, mamba and gated_conv.
        lora_alpha: what an adapter adds is multiplied by lora_alpha / rank; None for rank.
        also_train: names of layers that are trained whole, a new `"head"` for example; all layers of that name.

    Returns:
        `{"trained": count, "weights": count, "share": trained / weights}`.

    Raises:
        ValueError: for an unknown target or layer, one that is not there, numbers out of range, or a layer with
            adapters or without weights.

    Example:
        >>> import keras_jamba
        >>> model = keras_jamba.DHCJamba.from_preset("digits")
        >>> share = model.enable_lora(4, also_train="head")["share"]

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
    """Leaves the adapters and the layers `whole` to be trained, and nothing else."""
    trained = {id(inner) for each in fully_trained for inner in _keras_internals.sublayers(each)}
    thaw(layer)
    for each in _keras_internals.sublayers(layer):
        if id(each) in trained:
            continue
        if not (isinstance(each, QuantizableWeights) or _keras_internals.direct_sublayers(each)):
            # A layer by itself knows that it is frozen: batch norm keeps its statistics.
            each.trainable = False
            continue
        for variable in _keras_internals.own_variables(each)[0]:
            variable.trainable = is_adapter(variable)
    _backend.trainer.on_weights_replaced(layer)


def thaw(layer):
    # TensorFlow passes over a value that an attribute has already.
    layer.trainable = False
    layer.trainable = True


def print_trainable_parameters(layer):
    """Prints and returns how many weights are trained."""
    trained = sum(math.prod(v.shape) for v in layer.trainable_variables)
    adapted = [each for _, each in quantizable_layers(layer) if each.lora_enabled]
    count = sum(len(each.matrices()) for each in adapted)
    weights = sum(map(math.prod, float_shapes(layer).values())) + trained
    print(
        f"Adapters of rank {adapted[0].lora_rank} beside {count} matrices: {trained:,} of {weights:,} weights are "
        f"trained, {trained / weights:.2%}."
    )
    return {"trained": trained, "weights": weights, "share": trained / weights}


def merge_lora(layer):
    """Adds all adapters to the weights beside which they stand and removes them; everything is trained again.

    The layer computes what it did, to rounding; weights in few bits are rounded to them anew.

    Raises:
        ValueError: if there are no adapters.
    """
    with deferred_garbage_collection():
        for each in with_adapters(layer):
            each.merge_lora()
    thaw(layer)
    _backend.trainer.on_weights_replaced(layer)


def with_adapters(layer):
    """The layers inside that have adapters; an error where none has."""
    found = [each for _, each in quantizable_layers(layer) if each.lora_enabled]
    if not found:
        raise ValueError(f"There must be adapters. Received: {layer.name!r} without any. Call enable_lora first.")
    return found


def is_adapter(variable):
    return variable.name.endswith(("_lora_a", "_lora_b"))


def _targeted(layer, targets):
    wanted = ("attention", "mamba", "gated_conv") if targets is None else targets
    wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    found = {}
    for target in wanted:
        if target not in _CHOICES:
            raise ValueError(
                f"targets must be among {list(_CHOICES)}. Received: {target!r}. Pass one or several of these."
            )
        theirs = {id(each): each for each in _of_kind(layer, *target.partition(".")[::2])}
        if not theirs and targets is not None:
            raise ValueError(
                f"A target must be in the model. Received: {target!r}, of which {layer.name!r} has none. Leave it out."
            )
        found |= theirs
    if not found:
        raise ValueError(
            f"There must be something to adapt. Received: {layer.name!r}, without mixers. Choose other targets."
        )
    return list(found.values())


def _of_kind(layer, kind, part):
    cls, parts = TARGETS[kind]
    for holder in _keras_internals.sublayers(layer):
        if isinstance(holder, cls):
            for name, each in quantizable_layers(holder):
                last = name.rpartition("/")[2]
                if not parts or last in ([part] if part else parts):
                    yield each


def _named(layer, names):
    inner = list(_keras_internals.sublayers(layer, include_self=False))
    there = {each.name for each in inner}
    for name in names:
        if name not in there:
            raise ValueError(
                f"also_train must name layers of {layer.name!r}, {sorted(there)[:20]}. Received: {name!r}. "
                "Pass the name of one of them."
            )
    found = [each for each in inner if each.name in names]
    few = [part.path for each in found for _, part in quantizable_layers(each) if part.quantization_mode]
    if few:
        raise ValueError(
            f"What is trained whole must be in floating point. Received: also_train={names}, with {few[0]!r} in few "
            "bits. Adapt it, or load the model in floating point."
        )
    return found

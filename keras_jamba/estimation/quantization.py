"""Counts and bytes of quantized weights."""

import math
from typing import NamedTuple

from keras_jamba.layers.quantization import QUANTIZATIONS
from keras_jamba.ops.quantization import storage_specs

_BYTES = {"int8": 1, "float32": 4}


class QuantizedWeights(NamedTuple):
    """The number of quantized weights, and their stored bytes including scales."""

    parameters: int = 0
    stored: int = 0

    def __add__(self, other):
        return QuantizedWeights(*(a + b for a, b in zip(self, other, strict=True)))


def block(plan, mixer, feed_forward):
    return _sum(plan, "projection", _MIXERS[mixer](plan)) + _FEED_FORWARDS[feed_forward](plan)


def head(plan):
    words, tied = plan.vocabulary
    return QuantizedWeights() if tied else _sum(plan, "head", [(plan.d, words)])


def none(*arguments):
    return QuantizedWeights()


def _sum(plan, kind, shapes):
    mode = QUANTIZATIONS.get(plan.config["quantization"], {}).get(kind)
    if mode is None:
        return QuantizedWeights()
    tensors = [part for shape in shapes for part in storage_specs(shape, mode).values()]
    return QuantizedWeights(
        sum(map(math.prod, shapes)), sum(math.prod(shape) * _BYTES[dtype] for shape, dtype in tensors)
    )


def _mamba(plan):
    # The time step's projection is not quantized.
    return _gated_conv(plan) + plan.directions * [(plan.e, plan.r + 2 * plan.n)]


def _gated_conv(plan):
    return [(plan.d, 2 * plan.e), (plan.e, plan.d)]


def _attention(plan):
    return 2 * [(plan.d, plan.d)] + 2 * [(plan.d, plan.g * plan.c)]


def _perceptron(plan, stack=()):
    return [*(2 if plan.config["use_swiglu"] else 1) * [(*stack, plan.d, plan.f)], (*stack, plan.f, plan.d)]


_MIXERS = {"mamba": _mamba, "gated_conv": _gated_conv, "attention": _attention}
_FEED_FORWARDS = {
    "dense": lambda plan: _sum(plan, "projection", _perceptron(plan)),
    "moe": lambda plan: _sum(plan, "bank", _perceptron(plan, (plan.x,))),
    None: none,
}

"""How many numbers the layers of a model own."""

from typing import NamedTuple

from keras_jamba.estimation._plan import encoder_convolutions


class Numbers(NamedTuple):
    """Numbers of one layer: all that are trained, those of them that one token uses, and statistics besides."""

    parameters: int
    active: int
    statistics: int = 0

    def __add__(self, other):
        return Numbers(*(a + b for a, b in zip(self, other, strict=True)))


def _same(count):
    """Numbers that every token goes through."""
    return Numbers(count, count)


def block(plan, mixer, feed_forward):
    norms = _same(plan.d if feed_forward is None else 2 * plan.d)
    return norms + _MIXERS[mixer](plan) + _FEED_FORWARDS[feed_forward](plan)


def _mamba(plan):
    e, n, r = plan.e, plan.n, plan.r
    ssm = e * (r + 2 * n) + r * e + e + e * n + e + (r + 2 * n) * plan.config["mixer_rms_norm"]
    return _gated_conv(plan) + _same(plan.directions * ssm)


def _gated_conv(plan):
    d, e, config = plan.d, plan.e, plan.config
    convolution = plan.k * e + e * config["conv_bias"]
    return _same(plan.directions * convolution + d * 2 * e + e * d + (2 * e + d) * config["proj_bias"])


def _attention(plan):
    return _same(2 * plan.d * plan.d + 2 * plan.d * plan.g * plan.c)


def perceptron(plan):
    return (3 if plan.config["use_swiglu"] else 2) * plan.d * plan.f


def _dense(plan):
    return _same(perceptron(plan))


def _moe(plan):
    router = plan.d * plan.x
    # usage, drop_rate and aux_loss: what the layer remembers of its last call.
    statistics = plan.x + 2
    return Numbers(router + plan.x * perceptron(plan), router + plan.chosen * perceptron(plan), statistics)


_MIXERS = {"mamba": _mamba, "gated_conv": _gated_conv, "attention": _attention}
_FEED_FORWARDS = {"dense": _dense, "moe": _moe, None: lambda plan: _same(0)}


def encoder(plan):
    convolutions = encoder_convolutions(plan)
    # Of each its kernel, and two of: scale and offset of a batch norm, or the bias, and the scale of an RMSNorm.
    trained = sum(side * side * i * o + 2 * o for i, o, side, _ in convolutions)
    # Mean and variance of the batch norms.
    statistics = sum(2 * o for _, o, _, _ in convolutions) if plan.image.stem == "conv" else 0
    return Numbers(trained, trained, statistics)


def tokens(plan):
    """Of frames a projection of features and place, and its bias; a grid is tokens as it is."""
    return _same((plan.d + 3) * plan.d if plan.image.tokens == "frames" else 0)


def readout(plan):
    return _same(plan.d if plan.image.readout == "seqpool" else 0)


def embedding(plan):
    """One row is looked up for a token, but Jamba's authors and others count the whole table as active."""
    return _same(plan.vocabulary[0] * plan.d)


def head(plan):
    if plan.image:
        return _same((plan.d + 1) * plan.image.num_classes)
    words, tied = plan.vocabulary
    return _same(0 if tied else plan.d * words)


def final_norm(plan):
    # The auxiliary loss of all layers together is kept by the backbone itself.
    together = plan.config["balance_over"] == "model" and any(kind == "moe" for _, kind in plan.pattern)
    return Numbers(plan.d, plan.d, int(together))

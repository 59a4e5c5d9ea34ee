"""Counts of the layers' weights and statistics."""

from typing import NamedTuple

from keras_jamba.estimation._plan import encoder_convolutions


class Numbers(NamedTuple):
    """Counts of one layer: trained weights, the trained weights that one token uses, and statistics."""

    parameters: int
    active: int
    statistics: int = 0

    def __add__(self, other):
        return Numbers(*(a + b for a, b in zip(self, other, strict=True)))


def _same(count):
    """Returns the counts of weights that every token uses."""
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
    convolution = plan.w * e + e * config["conv_bias"]
    return _same(plan.directions * convolution + d * 2 * e + e * d + (2 * e + d) * config["proj_bias"])


def _attention(plan):
    return _same(2 * plan.d * plan.d + 2 * plan.d * plan.g * plan.c)


def perceptron(plan):
    return (3 if plan.config["use_swiglu"] else 2) * plan.d * plan.f


def _dense(plan):
    return _same(perceptron(plan))


def _moe(plan):
    router = plan.d * plan.x
    # usage, drop_rate and aux_loss of the last call.
    statistics = plan.x + 2
    return Numbers(router + plan.x * perceptron(plan), router + plan.chosen * perceptron(plan), statistics)


_MIXERS = {"mamba": _mamba, "gated_conv": _gated_conv, "attention": _attention}
_FEED_FORWARDS = {"dense": _dense, "moe": _moe, None: lambda plan: _same(0)}


def encoder(plan):
    convolutions = encoder_convolutions(plan)
    # Per convolution a kernel and two vectors: scale and offset of a batch norm, or a bias and an RMSNorm's scale.
    trained = sum(side * side * i * o + 2 * o for i, o, side, _ in convolutions)
    # Mean and variance of the batch norms.
    statistics = sum(2 * o for _, o, _, _ in convolutions) if plan.image.stem != "patchify" else 0
    return Numbers(trained, trained, statistics)


def tokens(plan):
    """Counts the projection of features and positions with its bias for frames; grid tokens have no weights."""
    return _same((plan.d + 3) * plan.d if plan.image.tokens == "frames" else 0)


def readout(plan):
    return _same(plan.d if plan.image.readout == "seqpool" else 0)


def embedding(plan):
    """Counts the complete table as active, like Jamba's authors, although a token uses one row."""
    return _same(plan.vocabulary[0] * plan.d)


def head(plan):
    if plan.image:
        return _same((plan.d + 1) * plan.image.num_classes)
    words, tied = plan.vocabulary
    return _same(0 if tied else plan.d * words)


def final_norm(plan):
    # The backbone keeps the auxiliary loss of all layers together.
    together = plan.config["balance_over"] == "model" and any(kind == "moe" for _, kind in plan.pattern)
    return Numbers(plan.d, plan.d, int(together))

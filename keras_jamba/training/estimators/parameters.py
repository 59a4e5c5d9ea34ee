"""How many numbers the layers of a model own."""

from typing import NamedTuple

from keras_jamba.training.estimators._plan import encoder_convolutions


class Numbers(NamedTuple):
    """Numbers of one layer: all that are trained, those of them that one token uses, and statistics besides."""

    parameters: int
    active: int
    statistics: int = 0

    def __add__(self, other):
        return Numbers(*(a + b for a, b in zip(self, other, strict=True)))


def block(plan, mixer, feed_forward):
    norms = Numbers(2 * plan.d, 2 * plan.d)
    return norms + _MIXERS[mixer](plan) + _FEED_FORWARDS[feed_forward](plan)


def _mamba(plan):
    d, e, n, k, r = plan.d, plan.e, plan.n, plan.k, plan.r
    config = plan.config
    ssm = k * e + e * config["conv_bias"] + e * (r + 2 * n) + r * e
    ssm += e + e * n + e + (r + 2 * n) * config["mixer_rms_norm"]
    ssm *= 1 + config["bidirectional"]
    count = ssm + d * 2 * e + e * d + (2 * e + d) * config["proj_bias"]
    return Numbers(count, count)


def _attention(plan):
    count = 2 * plan.d * plan.d + 2 * plan.d * plan.g * plan.c
    return Numbers(count, count)


def perceptron(plan):
    return (3 if plan.config["use_swiglu"] else 2) * plan.d * plan.f


def _dense(plan):
    return Numbers(perceptron(plan), perceptron(plan))


def _moe(plan):
    router = plan.d * plan.x
    # usage, drop_rate and aux_loss: what the layer remembers of its last call.
    statistics = plan.x + 2
    return Numbers(router + plan.x * perceptron(plan), router + plan.chosen * perceptron(plan), statistics)


_MIXERS = {"mamba": _mamba, "attention": _attention}
_FEED_FORWARDS = {"dense": _dense, "moe": _moe}


def encoder(plan):
    convolutions = encoder_convolutions(plan)
    trained = sum(9 * i * o + 2 * o for i, o, _ in convolutions)
    # Mean and variance of the batch norms.
    return Numbers(trained, trained, sum(2 * o for _, o, _ in convolutions))


def embedding(plan):
    """One row is looked up for a token, but Jamba's authors and others count the whole table as active."""
    count = plan.vocabulary[0] * plan.d
    return Numbers(count, count)


def head(plan):
    if plan.image:
        count = plan.d * plan.image[0] + plan.image[0]
    else:
        words, tied = plan.vocabulary
        count = 0 if tied else plan.d * words
    return Numbers(count, count)


def final_norm(plan):
    return Numbers(plan.d, plan.d)

"""From a sequence to the one vector that is classified, at once or token by token."""

import keras
from keras import ops


class _WeightedMean(keras.layers.Layer):
    """The mean of the tokens with weights `exp(score)`.

    Call arguments:
        inputs: `(b, t, d)`.

    Returns:
        `(b, d)` float32, whatever the dtype policy: the sum of many.
    """

    def __init__(self, **kwargs):
        # No autocast: it would round the float32 state to the compute dtype on its way in.
        super().__init__(autocast=False, **kwargs)

    def call(self, inputs):
        scores = self.scores(inputs)
        weights = ops.exp(scores - ops.max(scores, axis=1, keepdims=True))
        return _mean(inputs, weights, ops.sum(weights, axis=1))

    def init_cache(self, batch_size, d_model):
        """The state before the first token."""
        cache = {name: ops.zeros((batch_size, d_model), "float32") for name in ("mean", "mean_lost")}
        cache |= {name: ops.zeros((batch_size,), "float32") for name in ("total", "total_lost")}
        return cache | {"largest": ops.full((batch_size,), -1e30, "float32")}

    def step(self, inputs, cache):
        """Some more tokens `(b, t, d)`; `((b, d) of all so far, cache)`.

        Weights are relative to the largest score so far, and both sums carry what rounding lost: after a hundred
        million tokens one more still counts.
        """
        scores = self.scores(inputs)
        largest = ops.maximum(cache["largest"], ops.max(scores, axis=1))
        weights = ops.exp(scores - largest[:, None])
        smaller = ops.exp(cache["largest"] - largest)
        new = ops.sum(weights, axis=1)
        total, total_lost = _add(cache["total"] * smaller, cache["total_lost"] * smaller, new)
        share = (new / total)[:, None]
        distance = _mean(inputs, weights, new) - cache["mean"]
        mean, mean_lost = _add(cache["mean"], cache["mean_lost"], share * distance)
        names = ("mean", "mean_lost", "total", "total_lost", "largest")
        return mean, dict(zip(names, (mean, mean_lost, total, total_lost, largest), strict=True))

    def compute_output_spec(self, inputs):
        return keras.KerasTensor((inputs.shape[0], inputs.shape[-1]), "float32")


def _mean(inputs, weights, total):
    return ops.sum(weights[..., None] * ops.cast(inputs, "float32"), axis=1) / total[:, None]


def _add(value, lost, increment):
    """`value + increment`, and what rounding lost of it (Kahan 1965)."""
    increment = increment - lost
    result = value + increment
    return result, (result - value) - increment


@keras.saving.register_keras_serializable(package="keras_jamba")
class MeanReadout(_WeightedMean):
    """The mean of all tokens.

    Call arguments:
        inputs: `(b, t, d)`.

    Returns:
        `(b, d)` float32.
    """

    def call(self, inputs):
        return ops.mean(ops.cast(inputs, "float32"), axis=1)

    def scores(self, inputs):
        return ops.zeros(ops.shape(inputs)[:2], "float32")


@keras.saving.register_keras_serializable(package="keras_jamba")
class SequencePooling(_WeightedMean):
    """The mean of all tokens, weighted by the softmax over time of a score that a dense layer gives each.

    Call arguments:
        inputs: `(b, t, d)`.

    Returns:
        `(b, d)` float32.

    Reference:
        [Hassani et al. (2021)](https://arxiv.org/abs/2104.05704).
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Zeros: it begins as the plain mean.
        self.score = keras.layers.Dense(
            1, use_bias=False, kernel_initializer="zeros", name="score", dtype=self.dtype_policy
        )

    def build(self, input_shape):
        self.score.build(input_shape)

    def scores(self, inputs):
        return ops.cast(self.score(inputs)[..., 0], "float32")


@keras.saving.register_keras_serializable(package="keras_jamba")
class LastReadout(keras.layers.Layer):
    """The last token, which has seen all others.

    Call arguments:
        inputs: `(b, t, d)`.

    Returns:
        `(b, d)` float32.
    """

    def call(self, inputs):
        return ops.cast(inputs[:, -1], "float32")

    def init_cache(self, batch_size, d_model):
        """Nothing has to be remembered."""
        return {}

    def step(self, inputs, cache):
        """The last of some more tokens, `((b, d), cache)`."""
        return self(inputs), cache

    def compute_output_spec(self, inputs):
        return keras.KerasTensor((inputs.shape[0], inputs.shape[-1]), "float32")

"""Readouts: a sequence to one vector, in one call or token by token."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Tensor
from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._trainable import KeepsTrainable
from keras_jamba.ops import _checks
from keras_jamba.ops._tokens import zero_padding

_LEAST_SCORE = -1e30  # a score with weight 0


class _Readout(KeepsTrainable, keras.layers.Layer):
    """The base class of readouts; a subclass defines `_specs(batch_size, d_model)` of its state."""

    def __init__(self, **kwargs: Any) -> None:
        # Autocast would round the float32 state to the compute dtype.
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True

    def build(self, input_shape: Sequence[int | None]) -> None:
        if len(input_shape) != 3:
            raise ValueError(
                f"The input of {type(self).__name__} must have the shape (b, t, d). Received: shape="
                f"{tuple(input_shape)}. Add the missing axis."
            )

    def compute_mask(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        return None

    def init_cache(self, batch_size: int, d_model: int) -> dict[str, Tensor]:
        """Returns the state before the first token."""
        fill = {"largest": _LEAST_SCORE}
        specs = self._specs(batch_size, d_model)
        return {name: ops.full(spec.shape, fill.get(name, 0.0), "float32") for name, spec in specs.items()}

    def _checked(self, inputs, cache):
        return _checks.check_state("cache", cache, self._specs(inputs.shape[0], inputs.shape[-1]))

    def compute_output_spec(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return keras.KerasTensor((inputs.shape[0], inputs.shape[-1]), "float32")


class _WeightedMean(_Readout):
    """The mean of the tokens with weights `exp(score)`; a subclass defines `scores(inputs)`, `(b, t)` float32."""

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = mask_of(inputs, mask)
        inputs = zero_padding(inputs, mask)
        scores = self.scores(inputs)
        if mask is not None:
            scores = ops.where(mask, scores, _LEAST_SCORE)
        weights = ops.exp(scores - ops.max(scores, axis=1, keepdims=True))
        return _mean(inputs, weights, ops.sum(weights, axis=1))

    def _specs(self, batch_size, d_model):
        wide = {name: keras.KerasTensor((batch_size, d_model), "float32") for name in ("mean", "mean_lost")}
        return wide | {name: keras.KerasTensor((batch_size,), "float32") for name in ("total", "total_lost", "largest")}

    def step(self, inputs: Tensor, cache: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns `((b, d), cache)`, the mean of all tokens so far, after `(b, t, d)` more tokens.

        Weights are relative to the largest score so far. Both sums carry their rounding errors, so that one more token
        counts even after a hundred million tokens.
        """
        cache = self._checked(inputs, cache)
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


def _mean(inputs, weights, total):
    return ops.sum(ops.expand_dims(weights, 2) * ops.cast(inputs, "float32"), axis=1) / total[:, None]


def _add(value, lost, increment):
    """Returns `value + increment` and its rounding error; `lost` is the earlier error (Kahan 1965)."""
    increment = increment - lost
    result = value + increment
    return result, (result - value) - increment


@keras.saving.register_keras_serializable(package="keras_jamba")
class MeanReadout(_WeightedMean):
    """The mean of all tokens.

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, the Keras mask. The mean ignores tokens where it is False.

    Returns:
        `(b, d)` float32 under every dtype policy, because it is a sum of many terms.
    """

    def scores(self, inputs: Tensor) -> Tensor:
        return ops.zeros(ops.shape(inputs)[:2], "float32")


@keras.saving.register_keras_serializable(package="keras_jamba")
class SequencePooling(_WeightedMean):
    """The mean of all tokens, weighted by the softmax over time of their scores. A dense layer computes the scores.

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, the Keras mask. The mean ignores tokens where it is False.

    Returns:
        `(b, d)` float32 under every dtype policy, because it is a sum of many terms.

    Reference:
        [Hassani et al. (2021)](https://arxiv.org/abs/2104.05704).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Zeros: the initial readout is the plain mean.
        self.score = keras.layers.Dense(
            1, use_bias=False, kernel_initializer="zeros", name="score", dtype=self.dtype_policy
        )

    def build(self, input_shape: Sequence[int | None]) -> None:
        super().build(input_shape)
        self.score.build(input_shape)

    def scores(self, inputs: Tensor) -> Tensor:
        return ops.cast(self.score(inputs)[..., 0], "float32")


@keras.saving.register_keras_serializable(package="keras_jamba")
class LastReadout(_Readout):
    """The last token, whose features depend on all tokens.

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, the Keras mask. The readout is the last token where it is True.

    Returns:
        `(b, d)` float32.
    """

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = mask_of(inputs, mask)
        if mask is None:
            return ops.cast(inputs[:, -1], "float32")
        positions = ops.arange(ops.shape(inputs)[1], dtype="int32")
        last = ops.max(ops.where(mask, positions, 0), axis=1)
        return ops.cast(_backend.tensors.take_tokens(inputs, last[:, None])[:, 0], "float32")

    def _specs(self, batch_size, d_model):
        return {}

    def step(self, inputs: Tensor, cache: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns `((b, d), cache)`, the last of `(b, t, d)` more tokens; the cache is empty."""
        return self(inputs), self._checked(inputs, cache)

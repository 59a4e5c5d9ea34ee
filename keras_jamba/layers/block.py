"""One layer of the backbone: a mixer over time and a feed-forward part, each with a norm and a skip connection."""

import functools
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import keras

from keras_jamba._typing import Config, PathLike, Tensor, Tensors
from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._norm import RMSNorm
from keras_jamba.layers._requested import append_requested, split_requested
from keras_jamba.layers._trainable import KeepsTrainable
from keras_jamba.ops import _checks
from keras_jamba.ops._tokens import zero_padding

# The file of the generator's state in a `.keras` file.
_SEED = "seed_generator.json"


@keras.saving.register_keras_serializable(package="keras_jamba")
class JambaBlock(KeepsTrainable, keras.layers.Layer):
    """Residual block: `x = x + mixer(norm(x))`, then `x = x + feed_forward(norm(x))`, with RMSNorm.

    Args:
        mixer: a layer `(b, t, d)` to `(b, t, d)`: `MambaLayer`, `AttentionLayer` or your own. The call of your own
            layer must accept mask, segment_ids, reset_mask, initial_state and return_state where you use them.
        feed_forward: a layer `(b, t, d)` to `(b, t, d)`: `FeedForward`, `MoELayer` or your own. None means that the
            block ends with the mixer.
        dropout: share of each branch's outputs that training drops.
        drop_path: share of the sequences in a batch whose branch training drops ("stochastic depth",
            [Huang et al., 2016](https://arxiv.org/abs/1603.09382)). Each branch draws its own sequences. The branch
            of the other sequences is multiplied by `1 / (1 - drop_path)`.
        epsilon: number added to the mean square in the norms.

    Call arguments:
        inputs: `(b, t, d)`.
        mask, segment_ids, reset_mask, initial_state, return_state: see the mixer. The feed-forward part also receives
            the mask if its call accepts one.
        return_routing: see `MoELayer`; only for a block with experts.
        training: whether to apply dropout.

    Returns:
        `(b, t, d)`, or a tuple of that and the requested extras: the mixer's state, then the routing.

    Raises:
        ValueError: if an argument is out of range, the input has another width, the call of the mixer does not accept
            a given argument, or `return_routing` is set without experts.

    Example:
        >>> from keras_jamba.layers import FeedForward, JambaBlock, MambaLayer
        >>> block = JambaBlock(MambaLayer(64), FeedForward(64))
    """

    @_checks.python_numbers
    def __init__(
        self,
        mixer: keras.layers.Layer,
        feed_forward: keras.layers.Layer | None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        epsilon: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        # Autocast would round a float32 state to the compute dtype.
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        for name, layer in (("mixer", mixer), ("feed_forward", feed_forward)):
            if not isinstance(layer, keras.layers.Layer) and not (name == "feed_forward" and layer is None):
                raise ValueError(
                    f"{name} must be a Keras layer. Received: {name}={layer!r}. "
                    "Pass for example MambaLayer(64) or FeedForward(64)."
                )
        for name, share in dict(dropout=dropout, drop_path=drop_path).items():
            _checks.check_number(name, share, low=0, high=0.99)
        _checks.check_number("epsilon", epsilon, low=0)
        self.mixer, self.feed_forward = mixer, feed_forward
        self.dropout, self.drop_path, self.epsilon = dropout, drop_path, epsilon
        self.mixer_norm = self._norm("mixer_norm")
        self.feed_forward_norm = None if feed_forward is None else self._norm("feed_forward_norm")
        # Exists at every rate, so that weights saved at one rate load at another.
        self.seed_generator = keras.random.SeedGenerator()

    def _norm(self, name):
        return RMSNorm(epsilon=self.epsilon, name=name, dtype=self.dtype_policy)

    def build(self, input_shape: Sequence[int | None]) -> None:
        self._width = input_shape[-1]
        for layer in (self.mixer_norm, self.mixer, self.feed_forward_norm, self.feed_forward):
            # The given layers may have weights already, for example in a loaded model.
            if layer is not None and not layer.built:
                layer.build(input_shape)

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        initial_state: Tensors | None = None,
        return_state: bool = False,
        return_routing: bool | Literal["decisions"] = False,
        training: bool | None = None,
    ) -> Tensors:
        _checks.check_last_axis("JambaBlock", inputs.shape, self._width)
        mask, _ = _checks.check_tokens(mask_of(inputs, mask), None, inputs.shape)
        x = zero_padding(keras.ops.cast(inputs, self.compute_dtype), mask)
        given = dict(mask=mask, segment_ids=segment_ids, reset_mask=reset_mask, initial_state=initial_state)
        given = {name: value for name, value in given.items() if value is not None}
        given |= {"return_state": True} if return_state else {}
        self._check_mixer_accepts(given)

        mixed, state = split_requested(self.mixer(self.mixer_norm(x), **given), return_state)
        x = x + self._dropped_out(mixed, training)
        x, routing = self._add_feed_forward(x, mask, training, return_routing)
        return append_requested(x, (return_state, state), (return_routing, routing))

    def init_cache(self, batch_size: int, max_length: int | None = None) -> Tensors:
        """Returns the cache before the first token; see the mixer."""
        return self.mixer.init_cache(batch_size, max_length)

    def step(
        self,
        inputs: Tensor,
        cache: Tensors,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        return_rollback_state: bool = False,
    ) -> tuple[Tensors, ...]:
        """Runs more tokens after the tokens of the cache; see the mixer.

        Returns:
            `(outputs, cache)`; with `return_rollback_state` also the input of `rollback`.

        Raises:
            ValueError: if the input has another width, or the mixer has no `rollback` for a rollback state.
        """
        if return_rollback_state:
            self._check_has_rollback()
        if self.built:
            _checks.check_last_axis("JambaBlock", inputs.shape, self._width)
        mask, _ = _checks.check_tokens(mask_of(inputs, mask), None, inputs.shape)
        x = zero_padding(keras.ops.cast(inputs, self.compute_dtype), mask)
        given = {"return_rollback_state": True} if return_rollback_state else {}
        given |= {} if reset_mask is None else {"reset_mask": reset_mask}

        mixed, *rest = self.mixer.step(self.mixer_norm(x), cache, mask=mask, segment_ids=segment_ids, **given)
        # A step assigns no variable, so that a compiler can compile it.
        return self._with_feed_forward_step(x, mixed, mask), *rest

    def _with_feed_forward_step(self, x, mixed, mask):
        if self.feed_forward is None:
            return x + mixed
        x, normed = self.feed_forward_norm.after_addition(x, mixed)
        y, _ = self._fed_forward(normed, mask, record=False)
        return x + y

    def rollback(self, rollback_state: Tensors, count: Tensor | Sequence[int]) -> Tensors:
        """Returns the cache after only the first `count` tokens of a step; see `JambaBackbone.rollback`."""
        self._check_has_rollback()
        return self.mixer.rollback(rollback_state, count)

    def _check_has_rollback(self):
        if not hasattr(self.mixer, "rollback"):
            raise ValueError(
                "Only a mixer with a rollback, whose step accepts return_rollback_state, can take tokens back. "
                f"Received: a {type(self.mixer).__name__} without. Add both to it, or continue from an earlier cache."
            )

    def _add_feed_forward(self, x, mask, training, return_routing=False):
        """Returns `(x + dropout(feed_forward(norm(x))), routing or None)`; `x` itself without a feed-forward part."""
        if self.feed_forward is None:
            self._check_routes(return_routing, ())
            return x, None
        y, routing = self._fed_forward(self.feed_forward_norm(x), mask, return_routing)
        return x + self._dropped_out(y, training), routing

    def _fed_forward(self, normed, mask, return_routing=False, record=True):
        """Returns `(feed_forward(normed), routing or None)`."""
        accepted = _call_arguments(self.feed_forward)
        self._check_routes(return_routing, accepted)
        given = {} if mask is None else {"mask": mask}
        given |= {"return_routing": return_routing} if return_routing else {}
        given |= {} if record else {"record": False}
        given = {name: value for name, value in given.items() if name in accepted}
        return split_requested(self.feed_forward(normed, **given), return_routing)

    def _check_mixer_accepts(self, given):
        missing = set(given) - _call_arguments(self.mixer)
        if missing:
            raise ValueError(
                f"A call with {sorted(given)} needs a mixer whose call takes them. Received: a "
                f"{type(self.mixer).__name__} without {sorted(missing)}. Add them to its call, or leave them out here."
            )

    def _check_routes(self, return_routing, accepted):
        if return_routing and "return_routing" not in accepted:
            raise ValueError(
                "Only a block with experts routes tokens. Received: return_routing=True for the block "
                f"{self.name!r}, whose feed_forward is a {type(self.feed_forward).__name__}. Leave it out here."
            )

    def _dropped_out(self, x, training):
        # Dropout per element, then per sequence.
        for share, noise_shape in ((self.dropout, None), (self.drop_path, (None, 1, 1))):
            if training and share:
                x = keras.random.dropout(x, share, noise_shape, seed=self.seed_generator)
        return x

    def save_assets(self, folder: PathLike) -> None:
        # Keras saves no generator state. Files of weights alone omit it, because the caller sets the seed.
        if self.dropout or self.drop_path:
            state = keras.ops.convert_to_numpy(self.seed_generator.state).tolist()
            (Path(folder) / _SEED).write_text(json.dumps(state), "utf-8")

    def load_assets(self, folder: PathLike | None) -> None:
        if folder is not None and (Path(folder) / _SEED).is_file():
            self.seed_generator.state.assign(json.loads((Path(folder) / _SEED).read_text("utf-8")))

    def compute_output_spec(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        initial_state: Tensors | None = None,
        return_state: bool = False,
        return_routing: bool | Literal["decisions"] = False,
        training: bool | None = None,
    ) -> Tensors:
        outputs = keras.KerasTensor(inputs.shape, self.compute_dtype)
        state = self.mixer.compute_output_spec(inputs, return_state=True)[1] if return_state else None
        given = {"return_routing": return_routing}
        feed_forward: Any = self.feed_forward
        routing = feed_forward.compute_output_spec(inputs, **given)[1] if return_routing else None
        return append_requested(outputs, (return_state, state), (return_routing, routing))

    def get_config(self) -> Config:
        return super().get_config() | {
            "mixer": keras.saving.serialize_keras_object(self.mixer),
            "feed_forward": self.feed_forward and keras.saving.serialize_keras_object(self.feed_forward),
            "dropout": self.dropout,
            "drop_path": self.drop_path,
            "epsilon": self.epsilon,
        }

    @classmethod
    def from_config(cls, config: Config) -> Self:
        config = dict(config)
        for part in ("mixer", "feed_forward"):
            config[part] = config[part] and keras.saving.deserialize_keras_object(config[part])
        return cls(**config)


def _call_arguments(layer):
    """Returns the names of the arguments of a layer's call."""
    return _arguments(getattr(layer.call, "__func__", layer.call))


@functools.cache
def _arguments(function):
    # Cached: every call of a block needs it, and inspection takes as long as several operations.
    return frozenset(inspect.signature(function).parameters)

"""One layer of the backbone: a mixer over time and a feed-forward part, each behind a norm and in a residual."""

import functools
import inspect
import json
from pathlib import Path

import keras

from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._norm import RMSNorm
from keras_jamba.layers._requested import append_requested
from keras_jamba.layers._trainable import KeepsTrainable
from keras_jamba.ops import _checks

# Beside the weights in a `.keras` file.
_SEED = "seed_generator.json"


@keras.saving.register_keras_serializable(package="keras_jamba")
class JambaBlock(KeepsTrainable, keras.layers.Layer):
    """`x = x + mixer(norm(x))`, then `x = x + feed_forward(norm(x))`, with RMSNorm.

    Args:
        mixer: a layer `(b, t, d)` to `(b, t, d)`: `MambaLayer`, `AttentionLayer` or your own. One of your own
            must take those of the call arguments mask, segment_ids, reset_mask, initial_state and return_state that
            you use.
        feed_forward: a layer `(b, t, d)` to `(b, t, d)`: `FeedForward`, `MoELayer` or your own; or None, for a block
            that ends with the mixer.
        dropout: share of each branch's outputs dropped in training.
        drop_path: share of the sequences of a batch for which a branch is left out in training, drawn for each
            branch anew ("stochastic depth", [Huang et al., 2016](https://arxiv.org/abs/1603.09382)); the other
            sequences' branch is scaled up by `1 / (1 - drop_path)`.
        epsilon: of the norms.

    Call arguments:
        inputs: `(b, t, d)`.
        mask, segment_ids, reset_mask, initial_state, return_state: see the mixer. A feed-forward part that takes a
            mask gets it too.
        return_routing: see `MoELayer`; for a block with experts.
        training: whether to drop out.

    Returns:
        `(b, t, d)`; or a tuple of that, the mixer's state and the routing, those that were asked for.

    Example:
        >>> from keras_jamba.layers import FeedForward, JambaBlock, MambaLayer
        >>> block = JambaBlock(MambaLayer(64), FeedForward(64))
    """

    @_checks.python_numbers
    def __init__(self, mixer, feed_forward, dropout=0.0, drop_path=0.0, epsilon=1e-6, **kwargs):
        # No autocast: it would round a float32 state to the compute dtype on its way in.
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
        # There whatever the rate, so that weights saved at one rate load at another.
        self.seed_generator = keras.random.SeedGenerator()

    def _norm(self, name):
        return RMSNorm(epsilon=self.epsilon, name=name, dtype=self.dtype_policy)

    def build(self, input_shape):
        self._width = input_shape[-1]
        for layer in (self.mixer_norm, self.mixer, self.feed_forward_norm, self.feed_forward):
            # The caller's layers may come with weights, as they do when a model is loaded.
            if layer is not None and not layer.built:
                layer.build(input_shape)

    def call(
        self,
        inputs,
        mask=None,
        segment_ids=None,
        reset_mask=None,
        initial_state=None,
        return_state=False,
        return_routing=False,
        training=None,
    ):
        _checks.check_last_axis("JambaBlock", inputs.shape, self._width)
        mask = mask_of(inputs, mask)
        inputs = keras.ops.cast(inputs, self.compute_dtype)
        given = dict(mask=mask, segment_ids=segment_ids, reset_mask=reset_mask, initial_state=initial_state)
        given = {name: value for name, value in given.items() if value is not None}
        given |= {"return_state": True} if return_state else {}
        self._check_mixer_takes(given)
        mixed = self.mixer(self.mixer_norm(inputs), **given)
        mixed, state = mixed if return_state else (mixed, None)
        x = inputs + self._dropped(mixed, training)
        outputs, routing = self._feed_forward(x, mask, training, return_routing)
        return append_requested(outputs, (return_state, state), (return_routing, routing))

    def init_cache(self, batch_size, max_length=None):
        """The mixer's; see there."""
        return self.mixer.init_cache(batch_size, max_length)

    def step(self, inputs, cache, mask=None, segment_ids=None, reset_mask=None, return_rollback_state=False):
        """Some more tokens after those that the cache has seen, `(outputs, cache)`; see the mixer's."""
        if return_rollback_state:
            self._check_takes_back()
        if self.built:
            _checks.check_last_axis("JambaBlock", inputs.shape, self._width)
        mask = mask_of(inputs, mask)
        inputs = keras.ops.cast(inputs, self.compute_dtype)
        given = {"return_rollback_state": True} if return_rollback_state else {}
        given |= {} if reset_mask is None else {"reset_mask": reset_mask}
        mixed, *rest = self.mixer.step(self.mixer_norm(inputs), cache, mask=mask, segment_ids=segment_ids, **given)
        # Nothing is assigned in a step: it can be compiled by itself.
        return self._feed_forward(inputs + mixed, mask, training=False, record=False)[0], *rest

    def rollback(self, rollback_state, count):
        """The cache after only some of the tokens of a step; see `JambaBackbone.rollback`."""
        self._check_takes_back()
        return self.mixer.rollback(rollback_state, count)

    def _check_takes_back(self):
        if not hasattr(self.mixer, "rollback"):
            raise ValueError(
                "Tokens are taken back by a mixer with a rollback, whose step takes return_rollback_state. Received: a "
                f"{type(self.mixer).__name__} without. Add them to it, or go on from a cache of before."
            )

    def _feed_forward(self, x, mask, training, return_routing=False, record=True):
        given = {} if mask is None else {"mask": mask}
        given |= {"return_routing": return_routing} if return_routing else {}
        given |= {} if record else {"record": False}
        taken = () if self.feed_forward is None else _taken_by(self.feed_forward)
        if return_routing and "return_routing" not in taken:
            raise ValueError(
                "Only a block with experts routes tokens. Received: return_routing=True for the block "
                f"{self.name!r}, whose feed_forward is a {type(self.feed_forward).__name__}. Leave it out here."
            )
        if self.feed_forward is None:
            return x, None
        result = self.feed_forward(self.feed_forward_norm(x), **{k: v for k, v in given.items() if k in taken})
        result, routing = result if return_routing else (result, None)
        return x + self._dropped(result, training), routing

    def _check_mixer_takes(self, given):
        missing = set(given) - _taken_by(self.mixer)
        if missing:
            raise ValueError(
                f"A call with {sorted(given)} needs a mixer whose call takes them. Received: a "
                f"{type(self.mixer).__name__} without {sorted(missing)}. Add them to its call, or leave them out here."
            )

    def _dropped(self, x, training):
        # Each element by itself, then each sequence as a whole.
        for share, noise_shape in ((self.dropout, None), (self.drop_path, (None, 1, 1))):
            if training and share:
                x = keras.random.dropout(x, share, noise_shape, seed=self.seed_generator)
        return x

    def save_assets(self, folder):
        # Keras puts the state of no generator into a file. Weights alone go without it: a seed is the caller's.
        if self.dropout or self.drop_path:
            state = keras.ops.convert_to_numpy(self.seed_generator.state).tolist()
            (Path(folder) / _SEED).write_text(json.dumps(state), "utf-8")

    def load_assets(self, folder):
        if folder is not None and (Path(folder) / _SEED).is_file():
            self.seed_generator.state.assign(json.loads((Path(folder) / _SEED).read_text("utf-8")))

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        segment_ids=None,
        reset_mask=None,
        initial_state=None,
        return_state=False,
        return_routing=False,
        training=None,
    ):
        outputs = keras.KerasTensor(inputs.shape, self.compute_dtype)
        state = self.mixer.compute_output_spec(inputs, return_state=True)[1] if return_state else None
        given = {"return_routing": return_routing}
        routing = self.feed_forward.compute_output_spec(inputs, **given)[1] if return_routing else None
        return append_requested(outputs, (return_state, state), (return_routing, routing))

    def get_config(self):
        return super().get_config() | {
            "mixer": keras.saving.serialize_keras_object(self.mixer),
            "feed_forward": self.feed_forward and keras.saving.serialize_keras_object(self.feed_forward),
            "dropout": self.dropout,
            "drop_path": self.drop_path,
            "epsilon": self.epsilon,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for part in ("mixer", "feed_forward"):
            config[part] = config[part] and keras.saving.deserialize_keras_object(config[part])
        return cls(**config)


def _taken_by(layer):
    """The names of the arguments of a layer's call."""
    return _arguments(getattr(layer.call, "__func__", layer.call))


@functools.cache
def _arguments(function):
    # Every call of a block asks, and the answer takes as long as several operations.
    return frozenset(inspect.signature(function).parameters)

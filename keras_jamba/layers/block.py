"""One layer of the backbone: a mixer over time and a feed-forward part, each behind a norm and in a residual."""

import keras

from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class JambaBlock(keras.layers.Layer):
    """`x = x + mixer(norm(x))`, then `x = x + feed_forward(norm(x))`, with RMSNorm.

    Args:
        mixer: a layer `(b, t, d)` to `(b, t, d)`: `MambaLayer`, `AttentionLayer` or your own.
        feed_forward: a layer `(b, t, d)` to `(b, t, d)`: `FeedForward`, `MoELayer` or your own.
        dropout: share of each branch's outputs dropped in training.
        epsilon: of the norms.

    Call arguments:
        inputs: `(b, t, d)`.
        training: whether to drop out.

    Returns:
        `(b, t, d)`.

    Example:
        >>> from keras_jamba.layers import FeedForward, JambaBlock, MambaLayer
        >>> block = JambaBlock(MambaLayer(64), FeedForward(64))
    """

    def __init__(self, mixer, feed_forward, dropout=0.0, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        for name, layer in (("mixer", mixer), ("feed_forward", feed_forward)):
            if not isinstance(layer, keras.layers.Layer):
                raise ValueError(
                    f"{name} must be a Keras layer. Received: {name}={layer!r}. "
                    "Pass for example MambaLayer(64) or FeedForward(64)."
                )
        _checks.check_number("dropout", dropout, low=0, high=0.99)
        _checks.check_number("epsilon", epsilon, low=0)
        self.mixer, self.feed_forward = mixer, feed_forward
        self.dropout, self.epsilon = dropout, epsilon
        self.mixer_norm, self.feed_forward_norm = (
            keras.layers.RMSNormalization(epsilon=epsilon, name=name, dtype=self.dtype_policy)
            for name in ("mixer_norm", "feed_forward_norm")
        )
        # There whatever the rate, so that weights saved at one rate load at another.
        self.seed_generator = keras.random.SeedGenerator()

    def build(self, input_shape):
        for layer in (self.mixer_norm, self.mixer, self.feed_forward_norm, self.feed_forward):
            # The caller's layers may come with weights, as they do when a model is loaded.
            if not layer.built:
                layer.build(input_shape)

    def call(self, inputs, training=None):
        x = inputs + self._dropped(self.mixer(self.mixer_norm(inputs)), training)
        return x + self._dropped(self.feed_forward(self.feed_forward_norm(x)), training)

    def _dropped(self, x, training):
        if not training or not self.dropout:
            return x
        return keras.random.dropout(x, self.dropout, seed=self.seed_generator)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {
            "mixer": keras.saving.serialize_keras_object(self.mixer),
            "feed_forward": keras.saving.serialize_keras_object(self.feed_forward),
            "dropout": self.dropout,
            "epsilon": self.epsilon,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for part in ("mixer", "feed_forward"):
            config[part] = keras.saving.deserialize_keras_object(config[part])
        return cls(**config)

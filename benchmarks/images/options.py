"""Rejected options of image models that are not in the package, for the ablation of `benchmarks.images.quality`."""

import keras
from keras import layers, ops

import keras_jamba
from keras_jamba.layers import AttentionLayer, FeedForward, JambaBlock, MambaLayer


class CrossScan(layers.Layer):
    """Two bidirectional Mamba mixers of half the width each: one reads rows, the other columns (Liu et al. 2024)."""

    def __init__(self, d_model, side, residual_gain, **kwargs):
        super().__init__(**kwargs)
        options = dict(expand=1, bidirectional=True, mixer_rms_norm=True, residual_gain=residual_gain)
        self.side = side
        self.rows, self.columns = (MambaLayer(d_model, name=name, **options) for name in ("rows", "columns"))

    def build(self, shape):
        self.rows.build(shape)
        self.columns.build(shape)

    def call(self, x):
        return self.rows(x) + self._transposed(self.columns(self._transposed(x)))

    def _transposed(self, x):
        grid = ops.reshape(x, (-1, self.side, self.side, x.shape[-1]))
        return ops.reshape(ops.transpose(grid, (0, 2, 1, 3)), (-1, self.side**2, x.shape[-1]))


class AxialAttention(AttentionLayer):
    """Attention with axial RoPE: half of a head's channels rotate by row, half by column (Heo et al. 2024)."""

    def __init__(self, *args, side, **kwargs):
        super().__init__(*args, **kwargs)
        self.side = side

    def _query_and_key(self, inputs, positions):
        cell = ops.broadcast_to(ops.arange(self.side**2, dtype="int32")[None], ops.shape(inputs)[:2])
        coordinates = [cell // self.side, cell % self.side]

        def rotated(x):
            halves = ops.split(x, 2, axis=-1)
            rope = keras_jamba.ops.rotary_embedding
            pairs = zip(halves, coordinates, strict=True)
            return ops.concatenate([rope(half, coordinate, 100.0, True) for half, coordinate in pairs], axis=-1)

        return (
            rotated(self._heads(self.q_proj(inputs), self.num_heads)),
            rotated(self._heads(self.k_proj(inputs), self.num_kv_heads)),
        )


class PositionConvolution(layers.Layer):
    """A 3 x 3 depthwise convolution of the grid, added to it (Chu et al. 2023)."""

    def build(self, shape):
        self.convolution = layers.DepthwiseConv2D(3, padding="same")
        self.convolution.build(shape)

    def call(self, grid):
        # Sums of shifted images, because vmap over replicas makes grouped convolutions slow to train.
        kernel = ops.convert_to_tensor(self.convolution.kernel)[..., 0]
        padded = ops.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = grid.shape[1:3]
        taps = [padded[:, i : i + height, j : j + width] * kernel[i, j] for i in range(3) for j in range(3)]
        return grid + sum(taps) + self.convolution.bias


class ClassToken(layers.Layer):
    """A learned token in the middle of the sequence (Zhu et al. 2024), which the head classifies."""

    def build(self, shape):
        self.middle = shape[1] // 2
        self.token = self.add_weight((1, 1, shape[-1]), "random_normal", name="token")

    def call(self, x):
        token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, x.shape[-1]))
        return ops.concatenate([x[:, : self.middle], token, x[:, self.middle :]], axis=1)

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] + 1, shape[2])


def options_model(config, mixer=None, attention=None, position=None, token=None, pattern=None):
    """Returns a function that builds `DHCJamba(**config)` from its layers, with some of them replaced."""

    def make():
        side = config["image_shape"][0] // config["downsample"]
        d, depth = config["d_model"], config["num_layers"]
        causal = config.get("direction", "causal") == "causal"
        gain = (2 * depth) ** -0.5

        def mixer_of(kind):
            if kind == "attention":
                options = dict(num_heads=4, causal=causal, residual_gain=gain)
                return attention(d, side=side, **options) if attention else AttentionLayer(d, **options)
            if mixer:
                return mixer(d, side, gain)
            return MambaLayer(d, mixer_rms_norm=True, bidirectional=not causal, residual_gain=gain)

        inputs = keras.Input(config["image_shape"])
        x = keras_jamba.layers.SpatialEncoder(d, config["downsample"])(inputs)
        x = position()(x) if position else x
        x = keras_jamba.layers.GridTokens()(x)
        class_token = token() if token else None
        x = class_token(x) if token else x
        for kind in pattern or ("mamba", "attention") * (depth // 2):
            feed_forward = FeedForward(d, 4 * d, residual_gain=gain)
            x = JambaBlock(mixer_of(kind), feed_forward, config["dropout"], config["drop_path"])(x)
        x = layers.RMSNormalization(epsilon=1e-6)(x)
        x = x[:, class_token.middle] if token else layers.GlobalAveragePooling1D()(x)
        return keras.Model(inputs, layers.Dense(config["num_classes"])(x))

    return make

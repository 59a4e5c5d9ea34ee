"""Models of `benchmarks.images.photos`: DHCJamba, and peers with as many parameters. All take bytes, 0 to 255."""

import keras
from keras import layers

import keras_jamba
from benchmarks.images.peers import Positions, resnet
from benchmarks.images.sizes import SIZES

_BODY = dict(stem="residual", direction="bidirectional", num_heads=4, moe_frequency=0)
# Candidates of 0.8 M parameters, for the ablation.
CANDIDATES = {
    "64 tokens": SIZES["small"],
    "base": _BODY | dict(d_model=96, num_layers=4, mamba_ratio=3, d_ff=192),
    "causal": _BODY | dict(d_model=96, num_layers=4, mamba_ratio=3, d_ff=216, direction="causal"),
    "experts": _BODY | dict(d_model=96, num_layers=4, mamba_ratio=3, d_ff=88, moe_frequency=2, num_experts=4),
    "deeper stem": _BODY | dict(d_model=96, num_layers=2, mamba_ratio=1, d_ff=192, stem_blocks=2),
    "wider": _BODY | dict(d_model=128, num_layers=2, mamba_ratio=1, d_ff=96),
    "256 tokens": _BODY | dict(d_model=88, num_layers=5, mamba_ratio=4, d_ff=176, downsample=2),
    "attention only": _BODY | dict(d_model=96, num_layers=4, mamba_ratio=0, d_ff=264),
    "gated convolution": _BODY | dict(d_model=96, num_layers=4, mamba_ratio=3, d_ff=216, mixer="gated_conv"),
}


def candidate(name, image_shape, num_classes, **changes):
    """Returns a `DHCJamba` of `CANDIDATES`."""
    options = CANDIDATES[name] | changes
    return keras_jamba.DHCJamba(num_classes, image_shape, pixel_range=(0, 255), **options)


def _of_bytes(make):
    """Returns a function of `(image_shape, num_classes)` for a model of floats from 0 to 1."""

    def made(image_shape, num_classes):
        inputs = keras.Input(image_shape)
        return keras.Model(inputs, make(image_shape, num_classes)(layers.Rescaling(1 / 255)(inputs)))

    return made


def _resnet_56(image_shape, num_classes):
    return resnet(16, image_shape, blocks=9, num_classes=num_classes)


def _compact_transformer(image_shape, num_classes, width=128, depth=7):
    """Returns a transformer on two convolutions with pooling: a narrower CCT-7/3x2 (Hassani et al. 2021)."""
    x = inputs = keras.Input(image_shape)
    for channels in (64, width):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False, activation="relu")(x)
        x = layers.MaxPooling2D(3, 2, padding="same")(x)
    x = Positions()(layers.Reshape((-1, width))(x))
    for i in range(depth):
        y = layers.LayerNormalization()(x)
        x = x + _kept(layers.MultiHeadAttention(4, width // 4, dropout=0.1)(y, y), 0.1 * i / (depth - 1))
        y = layers.Dense(width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + _kept(layers.Dense(width)(y), 0.1 * i / (depth - 1))
    x = layers.LayerNormalization()(x)
    weights = layers.Softmax(axis=1)(layers.Dense(1)(x))
    x = layers.Flatten()(layers.Dot(axes=1)([weights, x]))
    return keras.Model(inputs, layers.Dense(num_classes)(x))


def _kept(x, share):
    """Stochastic depth: drops a residual branch of a row with probability `share` in training."""
    return layers.Dropout(share, noise_shape=(None, 1, 1))(x) if share else x


def _encoder_alone(image_shape, num_classes, width=120, blocks=2):
    """Returns the residual encoder without a backbone: mean over the grid, and head."""
    inputs = keras.Input(image_shape)
    x = keras_jamba.layers.ResidualEncoder(width, blocks=blocks)(inputs)
    return keras.Model(inputs, layers.Dense(num_classes)(layers.GlobalAveragePooling2D()(x)))


PEERS = {
    "ResNet-56": _of_bytes(_resnet_56),
    "CCT": _of_bytes(_compact_transformer),
    "encoder alone": _of_bytes(_encoder_alone),
}

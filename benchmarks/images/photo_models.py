"""Models of `benchmarks.images.photos`: DHCJamba, and peers with as many parameters. All take bytes, 0 to 255."""

import keras
from keras import layers

import keras_jamba
from benchmarks.images.peers import Positions, resnet
from benchmarks.images.sizes import SIZES

_PHOTO = dict(stem="residual", downsample=2, direction="bidirectional", readout="seqpool", num_heads=4, moe_frequency=0)
_SMALL = _PHOTO | dict(d_model=96, num_layers=2, mamba_ratio=1, d_ff=80, stem_blocks=3)
PRESETS = {
    "small": _SMALL,
    "medium": _PHOTO | dict(d_model=160, num_layers=3, mamba_ratio=2, d_ff=160, stem_blocks=2),
    "large": _PHOTO
    | dict(d_model=256, num_layers=4, mamba_ratio=1, d_ff=512, stem_blocks=3, downsample=4, num_heads=8),
    "fashion": _PHOTO | dict(d_model=64, num_layers=2, mamba_ratio=1, d_ff=64, stem_blocks=2),
}
# Other models of 0.8 M parameters, for the ablation of "small".
CANDIDATES = {
    "64 tokens, conv stem": SIZES["small"],
    "64 tokens": _SMALL | dict(downsample=4, stem_blocks=2, d_ff=320),
    "more layers": _SMALL | dict(stem_blocks=2, num_layers=4, d_ff=72),
    "causal": _SMALL | dict(direction="causal", d_ff=104),
    "experts": _SMALL | dict(moe_frequency=2, num_experts=4, d_ff=40),
    "attention only": _SMALL | dict(mamba_ratio=0, d_ff=128),
    "gated convolution": _SMALL | dict(mixer="gated_conv", d_ff=128),
    "mean readout": _SMALL | dict(readout="mean"),
}


def candidate(name, image_shape, num_classes, **changes):
    """Returns a `DHCJamba` of `PRESETS` or `CANDIDATES`."""
    options = (PRESETS | CANDIDATES)[name] | changes
    return keras_jamba.DHCJamba(num_classes, image_shape, pixel_range=(0, 255), **options)


def _of_bytes(make):
    """Returns a function of `(image_shape, num_classes)` for a model of floats from 0 to 1."""

    def made(image_shape, num_classes):
        inputs = keras.Input(image_shape)
        return keras.Model(inputs, make(image_shape, num_classes)(layers.Rescaling(1 / 255)(inputs)))

    return made


def _resnet_56(image_shape, num_classes):
    return resnet(16, image_shape, blocks=9, num_classes=num_classes)


def _compact_transformer(image_shape, num_classes, width=136, depth=7):
    """Returns a transformer on a convolution with pooling: a narrower CCT-7/3x1 (Hassani et al. 2021)."""
    x = inputs = keras.Input(image_shape)
    x = layers.Conv2D(width, 3, padding="same", use_bias=False, activation="relu")(x)
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


def _encoder_alone(image_shape, num_classes, width=104, blocks=3):
    """Returns the residual encoder without a backbone: mean over the grid, and head."""
    inputs = keras.Input(image_shape)
    x = keras_jamba.layers.ResidualEncoder(width, 2, blocks=blocks)(inputs)
    return keras.Model(inputs, layers.Dense(num_classes)(layers.GlobalAveragePooling2D()(x)))


PEERS = {
    "ResNet-56": _of_bytes(_resnet_56),
    "CCT": _of_bytes(_compact_transformer),
    "encoder alone": _of_bytes(_encoder_alone),
}

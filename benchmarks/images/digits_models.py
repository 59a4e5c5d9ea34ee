"""Models of `benchmarks.images.quality`: those of the digits table and of the ablation of options."""

import keras
from keras import layers

import keras_jamba
from benchmarks.images.options import AxialAttention, ClassToken, CrossScan, PositionConvolution, options_model
from keras_jamba import presets

# The configuration of the shipped preset: 4 x 4 tokens with sides of two pixels.
DIGITS = presets.read("digits")[0]["config"]
IMAGE = tuple(DIGITS["image_shape"])
# Four layers, so that their order can matter: Mamba, attention, Mamba, attention.
DEEP = DIGITS | dict(num_layers=4)


def jamba(**options):
    return lambda: keras_jamba.DHCJamba(**DIGITS | options)


def deep(**options):
    return lambda: keras_jamba.DHCJamba(**DEEP | options)


def cnn():
    """Returns three convolutions with batch norm, flattened."""
    x = inputs = keras.Input(IMAGE)
    for width, stride in ((32, 1), (32, 1), (64, 2)):
        x = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
        x = layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Dropout(0.3)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def encoder_only():
    """Returns the model without its backbone: encoder, mean, head."""
    inputs = keras.Input(IMAGE)
    x = keras_jamba.layers.SpatialEncoder(DIGITS["d_model"], DIGITS["downsample"])(inputs)
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


NETWORKS = {
    "CNN": cnn,
    "encoder only": encoder_only,
    "gated convolution": jamba(mixer="gated_conv"),
    "DHCJamba": jamba(),
    "DHCJamba, bidirectional": jamba(direction="bidirectional"),
}

_BOTH = dict(direction="bidirectional")
ABLATION = {
    "base: causal, rows, conv stem, 4x4 tokens, RoPE, mean": deep(),
    "bidirectional": deep(**_BOTH),
    "snake": deep(scan_order="snake"),
    "bidirectional, snake": deep(**_BOTH, scan_order="snake"),
    "cross scan (rows and columns, both ways)": options_model(DEEP | _BOTH, mixer=CrossScan),
    "patchify stem": deep(stem="patchify"),
    "conv stem, 8x8 tokens": deep(downsample=1),
    "conv stem, 2x2 tokens": deep(downsample=4),
    "readout last": deep(readout="last"),
    "readout seqpool": deep(readout="seqpool"),
    "bidirectional, class token in the middle": options_model(DEEP | _BOTH, token=ClassToken),
    "conditional positions (3x3 depthwise)": options_model(DEEP, position=PositionConvolution),
    "axial RoPE": options_model(DEEP, attention=AxialAttention),
    "no positions": deep(use_rope=False),
    "attention last": options_model(DEEP, pattern=("mamba", "mamba", "attention", "attention")),
    "gated convolution for Mamba": deep(mixer="gated_conv"),
    "gated convolution, bidirectional": deep(mixer="gated_conv", **_BOTH),
    "Mamba only": deep(mamba_ratio=None),
    "attention only": deep(mamba_ratio=0),
    "four experts in every other layer": deep(moe_frequency=2, num_experts=4),
    "two layers": jamba(),
}
# The base of each option that is not compared with the first one.
BASES = {
    row: "bidirectional"
    for row in (
        "bidirectional, snake",
        "cross scan (rows and columns, both ways)",
        "bidirectional, class token in the middle",
        "gated convolution, bidirectional",
    )
}

"""Sizes of `DHCJamba` with 0.8, 2.0 and 8.5 M parameters and 64 tokens per 32 x 32 image.

Published figures of speed used them. The presets `small`, `medium` and `large` may have other sizes.
"""

import keras_jamba

_COMMON = dict(downsample=4, num_layers=8, mamba_ratio=7, moe_frequency=2, num_experts=8)
SIZES = {
    "small": _COMMON | dict(d_model=40, num_heads=4),
    "medium": _COMMON | dict(d_model=64, num_heads=4),
    "large": _COMMON | dict(d_model=128, num_heads=8),
}


def untrained(size, **changes):
    """Returns a model of `SIZES` with random weights."""
    return keras_jamba.DHCJamba(**SIZES[size] | changes)

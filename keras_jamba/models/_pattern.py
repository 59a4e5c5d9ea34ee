"""The pattern of mixers and feed-forward layers of a backbone."""

from keras_jamba.ops import _checks


def block_pattern(num_layers, mamba_ratio, attention_offset, moe_frequency, moe_offset, mixer="mamba", d_ff=None):
    """Returns a tuple of `(mixer, feed_forward)` per layer.

    `mixer` is "mamba" or "gated_conv". Layer i has attention instead if `i % (mamba_ratio + 1) == attention_offset`. It
    has experts, "moe", if `i % moe_frequency == moe_offset`, and else "dense", or None if `d_ff` is 0. An offset of
    None is the last layer of its period.

    Raises:
        ValueError: for arguments out of range, and for experts with a `d_ff` of 0.
    """
    _checks.check_integer("num_layers", num_layers)
    if mamba_ratio is not None:
        _checks.check_integer("mamba_ratio", mamba_ratio, at_least=0)
    _checks.check_integer("moe_frequency", moe_frequency, at_least=0)
    _checks.check_choice("mixer", mixer, ("mamba", "gated_conv"))
    attention_period = 0 if mamba_ratio is None else mamba_ratio + 1
    attention = _layers_at_offset("attention_offset", attention_offset, attention_period, num_layers)
    moe = _layers_at_offset("moe_offset", moe_offset, moe_frequency, num_layers)
    if d_ff == 0 and any(moe):
        raise ValueError(
            f"Experts are feed-forward parts. Received: d_ff=0 with moe_frequency={moe_frequency}. "
            "Pass moe_frequency=0, or a d_ff of at least 1."
        )
    dense = None if d_ff == 0 else "dense"
    return tuple(("attention" if a else mixer, "moe" if m else dense) for a, m in zip(attention, moe, strict=True))


def pattern_of(arguments):
    """Returns the block pattern of a dict of constructor arguments of a backbone."""
    names = ("num_layers", "mamba_ratio", "attention_offset", "moe_frequency", "moe_offset", "mixer", "d_ff")
    return block_pattern(**{name: arguments[name] for name in names})


def _layers_at_offset(name, offset, period, count):
    """Returns one bool per layer: whether it is at `offset` of its period; a period of 0 selects no layer."""
    if not period:
        return [False] * count
    offset = period - 1 if offset is None else offset
    _checks.check_integer(name, offset, at_least=0)
    if offset >= period:
        raise ValueError(
            f"{name} must be smaller than its period, {period}. Received: {name}={offset}. "
            f"Pass a value from 0 to {period - 1}, or None for the last."
        )
    return [i % period == offset for i in range(count)]

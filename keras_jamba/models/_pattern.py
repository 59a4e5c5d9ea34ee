"""Which layer of a backbone does what: the only place that decides it."""

from keras_jamba.ops import _checks


def block_pattern(num_layers, mamba_ratio, attention_offset, moe_frequency, moe_offset, mixer="mamba", d_ff=None):
    """One `(mixer, feed_forward)` a layer, from (mixer, "attention") x ("dense", "moe").

    With a `d_ff` of 0 there is None in the place of "dense".

    `mixer` is "mamba" or "gated_conv". Attention stands at layers i with
    `i % (mamba_ratio + 1) == attention_offset`, experts at those with `i % moe_frequency == moe_offset`; an
    offset of None is the last of its period.
    """
    _checks.check_integer("num_layers", num_layers)
    if mamba_ratio is not None:
        _checks.check_integer("mamba_ratio", mamba_ratio, at_least=0)
    _checks.check_integer("moe_frequency", moe_frequency, at_least=0)
    _checks.check_choice("mixer", mixer, ("mamba", "gated_conv"))
    attention_period = 0 if mamba_ratio is None else mamba_ratio + 1
    attention = _hits("attention_offset", attention_offset, attention_period, num_layers)
    moe = _hits("moe_offset", moe_offset, moe_frequency, num_layers)
    if d_ff == 0 and any(moe):
        raise ValueError(
            f"Experts are feed-forward parts. Received: d_ff=0 with moe_frequency={moe_frequency}. "
            "Pass moe_frequency=0, or a d_ff of at least 1."
        )
    dense = None if d_ff == 0 else "dense"
    return tuple(("attention" if a else mixer, "moe" if m else dense) for a, m in zip(attention, moe, strict=True))


def pattern_of(arguments):
    """Returns the block pattern of a dict with the constructor arguments of a backbone."""
    names = ("num_layers", "mamba_ratio", "attention_offset", "moe_frequency", "moe_offset", "mixer", "d_ff")
    return block_pattern(**{name: arguments[name] for name in names})


def _hits(name, offset, period, count):
    """For each layer, whether it is the one at `offset` of its period; a period of 0 hits none."""
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

"""Memory of the states that running on from earlier tokens needs."""

from keras_jamba.estimation._plan import bytes_of
from keras_jamba.ops import _checks


def kv_cache_bytes(num_attention_layers, num_kv_heads, head_width, context, batch_size=1, dtype="bfloat16"):
    """Memory of the keys and values of attention.

    Args:
        num_attention_layers: layers that attend.
        num_kv_heads: key-value heads g of each.
        head_width: width c of a head.
        context: tokens that are kept.
        batch_size: sequences b.
        dtype: of keys and values.

    Returns:
        Bytes: `2 * layers * b * context * g * c` numbers.

    Example:
        >>> from keras_jamba.estimation import kv_cache_bytes
        >>> kv_cache_bytes(4, 8, 128, context=256 * 1024) / 2**30  # Jamba-v0.1
        4.0

    Reference:
        [Lieber et al. (2024)](https://arxiv.org/abs/2403.19887), table 1.
    """
    sizes = dict(num_kv_heads=num_kv_heads, head_width=head_width, context=context, batch_size=batch_size)
    _checks.check_integer("num_attention_layers", num_attention_layers, at_least=0)
    for name, value in sizes.items():
        _checks.check_integer(name, value)
    return 2 * num_attention_layers * batch_size * context * num_kv_heads * head_width * bytes_of(dtype)


def cache_bytes(plan, run, mixer):
    """Bytes of what the mixer's `init_cache` holds, by kind; nothing where a layer has no state to go on from."""
    nothing = dict(kv_cache=0, conv_cache=0, ssm_cache=0, counters=0)
    if not _goes_on(plan):
        return nothing
    if mixer != "attention":
        conv = run.b * (plan.k - 1) * plan.e * run.computed
        ssm = 4 * run.b * plan.e * plan.n if mixer == "mamba" else 0
        return nothing | dict(conv_cache=conv, ssm_cache=ssm, counters=4 * run.b)
    room = min(run.t, plan.config["attention_window"] or run.t)
    return nothing | dict(kv_cache=2 * run.b * room * plan.g * plan.c * run.computed, counters=12 * run.b)


def readout_bytes(plan, run):
    """Bytes of the sums of a stream's readout, in float32: the mean, its weights', and what rounding lost of both."""
    return 4 * run.b * (2 * plan.d + 3) if _goes_on(plan) and plan.image.readout != "last" else 0


def _goes_on(plan):
    """Whether there are states to go on from: not after a whole image, nor where all tokens are needed at once."""
    return plan.directions == 1 and not (plan.image and plan.image.tokens == "grid")

"""Memory of the decoding states, which hold earlier tokens."""

from keras_jamba._typing import DType
from keras_jamba.estimation._plan import bytes_of
from keras_jamba.ops import _checks


def kv_cache_bytes(
    num_attention_layers: int,
    num_kv_heads: int,
    head_width: int,
    context: int,
    batch_size: int = 1,
    dtype: DType = "bfloat16",
) -> int:
    """Returns the memory of the key-value caches of attention.

    Args:
        num_attention_layers: attention layers.
        num_kv_heads: key-value heads g per layer.
        head_width: width c per head.
        context: cached tokens.
        batch_size: sequences b.
        dtype: dtype of keys and values.

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
    """Returns the bytes of the mixer's `init_cache` by kind, all 0 if the model has no cache."""
    nothing = dict(kv_cache=0, conv_cache=0, ssm_cache=0, counters=0)
    if not _has_cache(plan):
        return nothing
    if mixer != "attention":
        conv = run.b * (plan.w - 1) * plan.e * run.computed
        ssm = 4 * run.b * plan.e * plan.n if mixer == "mamba" else 0
        return nothing | dict(conv_cache=conv, ssm_cache=ssm, counters=4 * run.b)
    window = plan.config["attention_window"]
    capacity = min(run.t, window + plan.config["attention_sinks"] if window else run.t)
    return nothing | dict(kv_cache=2 * run.b * capacity * plan.g * plan.c * run.computed, counters=12 * run.b)


def readout_bytes(plan, run):
    """Returns the bytes of a stream's float32 readout sums: values, weights, and the rounding errors of both."""
    return 4 * run.b * (2 * plan.d + 3) if _has_cache(plan) and plan.image.readout != "last" else 0


def _has_cache(plan):
    """Returns whether the model has a cache. Bidirectional models and models of single images have none."""
    return plan.directions == 1 and not (plan.image and plan.image.tokens == "grid")

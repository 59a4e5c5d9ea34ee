"""Top-k routing of tokens to experts, and the losses that keep the routing healthy.

Where a function takes `mask`, `(tokens,)` bool or None, only the tokens where it is True count.
"""

import math

from keras import ops

from keras_jamba.ops import _checks


def top_k_routing(logits, k, normalize=True):
    """Chooses k experts a token.

    Args:
        logits: `(tokens, x)`, any floating dtype; the softmax is float32.
        k: experts a token, at most x.
        normalize: whether the k weights of a token sum to 1.

    Returns:
        `(weights, indices, probabilities)`: `(tokens, k)` float32, `(tokens, k)` int32, and the
        softmax over all experts, `(tokens, x)` float32.

    Raises:
        ValueError: if k is not between 1 and x.

    Reference:
        [Shazeer et al. (2017)](https://openreview.net/forum?id=B1ckMDqlg).
    """
    _checks.check_integer("k", k)
    if k > logits.shape[-1]:
        raise ValueError(
            f"k must be at most the number of experts. Received: k={k} with {logits.shape[-1]} experts. "
            "Lower k or add experts."
        )
    probabilities = ops.softmax(ops.cast(logits, "float32"), axis=-1)
    weights, indices = ops.top_k(probabilities, k)
    if normalize:
        weights = weights / ops.sum(weights, axis=-1, keepdims=True)
    return weights, ops.cast(indices, "int32"), probabilities


def mean_over_tokens(x, mask=None):
    """Mean over the first axis, of the tokens where `mask`, `(tokens,)` bool, is True; 0 where there are none."""
    if mask is None:
        return ops.mean(x, axis=0)
    real = ops.cast(mask, x.dtype)
    # Not a product: what is not finite in the padding shall not reach the mean.
    x = ops.where(ops.reshape(mask, (-1, *(1 for _ in x.shape[1:]))), x, 0.0)
    return ops.sum(x, axis=0) / ops.maximum(ops.sum(real), 1.0)


def expert_share(indices, num_experts, mask=None):
    """Share of all assignments that went to each expert, `(x,)` float32; sums to 1."""
    # Not `ops.one_hot`: on PyTorch it is a scatter of 64-bit integers.
    chosen = ops.equal(indices[:, :, None], ops.arange(num_experts, dtype=indices.dtype))
    chosen = ops.cast(chosen, "float32")
    return ops.mean(chosen, axis=(0, 1)) if mask is None else mean_over_tokens(ops.mean(chosen, axis=1), mask)


def max_load(share):
    """Load of the busiest expert, from `(..., x)` shares: 1 when balanced, x when one expert gets everything."""
    return ops.max(share, axis=-1) * share.shape[-1]


def share_entropy(share):
    """Entropy of `(..., x)` shares: 1 when balanced, 0 when one expert gets everything."""
    # x log x is 0 at 0; the logarithm of one expert's share is 0 however it is normalised. Not `ops.maximum`: on
    # PyTorch that takes the number to the device and waits for it there.
    return ops.sum(share * ops.log(share + 1e-9), axis=-1) / -math.log(max(share.shape[-1], 2))


def drop_rate(kept, mask=None):
    """Share of the assignments, of which `kept` `(tokens, k)` bool found room, that found none."""
    return mean_over_tokens(1.0 - ops.mean(ops.cast(kept, "float32"), axis=1), mask)


def routing_statistics(indices, num_experts, mask=None, kept=None):
    """How a routing spreads the tokens.

    Args:
        indices: `(tokens, k)`, the chosen experts.
        num_experts: experts x.
        mask: `(tokens,)` bool or None; True for the tokens that count.
        kept: `(tokens, k)` bool or None; False for assignments that found no room.

    Returns:
        A dict of float32: `"expert_share"` `(x,)`, the share of assignments each expert was given, those
        without room included; `"entropy"`, `"max_load"`, see `share_entropy` and `max_load`; `"drop_rate"`, the
        share of assignments without room. All are 0 where no token counts.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    tensors = {name: x for name, x in dict(indices=indices, mask=mask, kept=kept).items() if x is not None}
    _checks.check_shapes(tensors, {"indices": "sk", "mask": "s", "kept": "sk"})
    share = expert_share(indices, num_experts, mask)
    dropped = ops.zeros((), "float32") if kept is None else drop_rate(kept, mask)
    return {"expert_share": share, "entropy": share_entropy(share), "max_load": max_load(share), "drop_rate": dropped}


def variance_balance_loss(probabilities, mask=None):
    """`sum over experts of (usage - 1/x)^2`, usage being the mean probability; 0 when uniform."""
    usage = mean_over_tokens(probabilities, mask)
    return ops.sum(ops.square(usage - 1.0 / probabilities.shape[-1]))


def switch_balance_loss(probabilities, indices, mask=None):
    """`x * sum over experts of f * P`; k when uniform.

    f is the assignments an expert got by tokens, P its mean probability.

    Reference:
        [Fedus et al. (2021)](https://arxiv.org/abs/2101.03961), equation 4.
    """
    num_experts, k = probabilities.shape[-1], indices.shape[-1]
    assigned = k * expert_share(indices, num_experts, mask)
    return num_experts * ops.sum(assigned * mean_over_tokens(probabilities, mask))


def router_z_loss(logits, squared=True, mask=None):
    """Mean over tokens of `logsumexp(logits)^2`, which keeps logits small.

    `squared=False` is the form without the square, which has no lower bound.

    Reference:
        [Zoph et al. (2022)](https://arxiv.org/abs/2202.08906), equation 5.
    """
    size = ops.logsumexp(ops.cast(logits, "float32"), axis=-1)
    return mean_over_tokens(ops.square(size) if squared else size, mask)

"""Top-k routing of tokens to experts, and the losses that keep the routing healthy."""

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


def expert_share(indices, num_experts):
    """Share of all assignments that went to each expert, `(x,)` float32; sums to 1."""
    return ops.mean(ops.one_hot(indices, num_experts, dtype="float32"), axis=(0, 1))


def variance_balance_loss(probabilities):
    """`sum over experts of (usage - 1/x)^2`, usage being the mean probability; 0 when uniform."""
    usage = ops.mean(probabilities, axis=0)
    return ops.sum(ops.square(usage - 1.0 / probabilities.shape[-1]))


def switch_balance_loss(probabilities, indices):
    """`x * sum over experts of f * P`; k when uniform.

    f is the assignments an expert got by tokens, P its mean probability.

    Reference:
        [Fedus et al. (2021)](https://arxiv.org/abs/2101.03961), equation 4.
    """
    num_experts, k = probabilities.shape[-1], indices.shape[-1]
    assigned = k * expert_share(indices, num_experts)
    return num_experts * ops.sum(assigned * ops.mean(probabilities, axis=0))


def router_z_loss(logits, squared=True):
    """Mean over tokens of `logsumexp(logits)^2`, which keeps logits small.

    `squared=False` is the form without the square, which has no lower bound.

    Reference:
        [Zoph et al. (2022)](https://arxiv.org/abs/2202.08906), equation 5.
    """
    size = ops.logsumexp(ops.cast(logits, "float32"), axis=-1)
    return ops.mean(ops.square(size) if squared else size)

"""Top-k routing of tokens to experts, and losses that balance and bound it.

Every `mask` argument is `(s,)` bool or None: only tokens where it is True count.
"""

import math

from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Tensor
from keras_jamba.ops import _checks


def top_k_routing(logits: Tensor, k: int, normalize: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the k most probable experts per token.

    Args:
        logits: `(s, x)`, any floating dtype; the softmax is float32.
        k: experts per token, at most x.
        normalize: whether the k weights of each token are scaled to sum to 1.

    Returns:
        `(weights, indices, probabilities)`: the weights `(s, k)` float32, the expert indices `(s, k)` int32, and the
        softmax over all experts `(s, x)` float32.

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
    weights, indices = _backend.tensors.top_k(probabilities, k)
    if normalize:
        weights = weights / ops.sum(weights, axis=-1, keepdims=True)
    return weights, ops.cast(indices, "int32"), probabilities


def finite_routing(routing):
    """Returns a routing in which tokens with NaN or infinite logits have equal logits and probabilities.

    The mean of a loss would carry NaN and infinity into the gradients of all other tokens. `routing` is a dict with
    `"logits"` and `"probabilities"` `(s, x)`.
    """
    logits, probabilities = routing["logits"], routing["probabilities"]
    finite = ops.isfinite(ops.sum(logits, axis=-1, keepdims=True))
    # Tensors, because PyTorch would copy a constant to the device and synchronise.
    zeros = ops.zeros_like(logits)
    equal = zeros + 1.0 / logits.shape[-1]
    found = {"logits": ops.where(finite, logits, zeros), "probabilities": ops.where(finite, probabilities, equal)}
    return routing | found


def mean_over_tokens(x, mask=None):
    """Returns the mean over the first axis, of the tokens where `mask` `(s,)` is True; 0 if there are none."""
    if mask is None:
        return ops.mean(x, axis=0)
    real = ops.cast(mask, x.dtype)
    # `where`, because a product would carry NaN and infinity from padding into the mean.
    x = ops.where(ops.reshape(mask, (-1, *(1 for _ in x.shape[1:]))), x, 0.0)
    return ops.sum(x, axis=0) / ops.maximum(ops.sum(real), 1.0)


def expert_share(indices: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Returns the share of all assignments that each expert receives, `(x,)` float32; the shares sum to 1."""
    # `ops.one_hot` is avoided: on PyTorch it scatters 64-bit integers.
    chosen = ops.equal(indices[:, :, None], ops.arange(num_experts, dtype=indices.dtype))
    chosen = ops.cast(chosen, "float32")
    return ops.mean(chosen, axis=(0, 1)) if mask is None else mean_over_tokens(ops.mean(chosen, axis=1), mask)


def max_load(share):
    """Returns the load of the busiest expert, from `(..., x)` shares: 1 if balanced, x if one expert gets all."""
    return ops.max(share, axis=-1) * share.shape[-1]


def share_entropy(share):
    """Returns the normalized entropy of `(..., x)` shares: 1 if balanced, 0 if one expert gets all."""
    # The epsilon makes a zero share contribute 0. `ops.maximum` is avoided: on PyTorch it copies the number to the
    # device and synchronises.
    return ops.sum(share * ops.log(share + 1e-9), axis=-1) / -math.log(max(share.shape[-1], 2))


def drop_rate(kept, mask=None):
    """Returns the share of assignments that exceed an expert's capacity: those where `kept` `(s, k)` is False."""
    return mean_over_tokens(1.0 - ops.mean(ops.cast(kept, "float32"), axis=1), mask)


def routing_statistics(
    indices: Tensor, num_experts: int, mask: Tensor | None = None, kept: Tensor | None = None
) -> dict[str, Tensor]:
    """Computes how a routing distributes tokens over experts.

    Args:
        indices: `(s, k)`, the chosen experts.
        num_experts: the number of experts, x.
        mask: `(s,)` bool or None; True for the tokens that count.
        kept: `(s, k)` bool or None; False for assignments dropped by an expert's capacity.

    Returns:
        A dict of float32 tensors, all 0 if no token counts:

        - `"expert_share"` `(x,)`: the share of assignments per expert, dropped ones included.
        - `"entropy"` and `"max_load"`: see `share_entropy` and `max_load`.
        - `"drop_rate"`: the share of dropped assignments.

    Raises:
        ValueError: if the shapes do not match.
    """
    tensors = {name: x for name, x in dict(indices=indices, mask=mask, kept=kept).items() if x is not None}
    _checks.check_shapes(tensors, {"indices": "sk", "mask": "s", "kept": "sk"})
    share = expert_share(indices, num_experts, mask)
    dropped = ops.zeros((), "float32") if kept is None else drop_rate(kept, mask)
    return {"expert_share": share, "entropy": share_entropy(share), "max_load": max_load(share), "drop_rate": dropped}


def variance_balance_loss(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes `sum over experts of (usage - 1/x)^2`, where usage is the mean probability; 0 if uniform.

    Args:
        probabilities: `(s, x)`.
        mask: `(s,)` bool or None.

    Returns:
        A scalar.
    """
    usage = mean_over_tokens(probabilities, mask)
    return ops.sum(ops.square(usage - 1.0 / probabilities.shape[-1]))


def switch_balance_loss(probabilities: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes `x * sum over experts of assigned * probability`; k if uniform.

    `assigned` is the number of an expert's assignments divided by the number of tokens, `probability` its mean
    probability.

    Args:
        probabilities: `(s, x)`.
        indices: `(s, k)`, the chosen experts.
        mask: `(s,)` bool or None.

    Returns:
        A scalar.

    Reference:
        [Fedus et al. (2021)](https://arxiv.org/abs/2101.03961), equation 4.
    """
    num_experts, k = probabilities.shape[-1], indices.shape[-1]
    assigned = k * expert_share(indices, num_experts, mask)
    return num_experts * ops.sum(assigned * mean_over_tokens(probabilities, mask))


def router_z_loss(logits: Tensor, squared: bool = True, mask: Tensor | None = None) -> Tensor:
    """Computes the mean over tokens of `logsumexp(logits)^2`, which keeps logits small.

    Args:
        logits: `(s, x)`, any floating dtype.
        squared: False for the mean of `logsumexp(logits)`, which has no lower bound.
        mask: `(s,)` bool or None.

    Returns:
        A float32 scalar.

    Reference:
        [Zoph et al. (2022)](https://arxiv.org/abs/2202.08906), equation 5.
    """
    size = ops.logsumexp(ops.cast(logits, "float32"), axis=-1)
    return mean_over_tokens(ops.square(size) if squared else size, mask)

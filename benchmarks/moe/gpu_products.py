"""Products of a mixture of experts, the operations between them, and a peer's mixture.

All are functions of the arrays of `benchmarks.moe.gpu.random_device_arrays`.
"""

from keras import ops

from keras_jamba import _backend
from keras_jamba._triton import grouped as kernels
from keras_jamba.ops.experts._sorting import sorted_by_expert

EXPERTS, PER_TOKEN = 8, 2
launcher = _backend.kernels.triton_launcher
KERNELS = _backend.kernels.why_no_triton() is None


def dense_products():
    """Returns `{name: (number of products, function)}`: all rows multiplied by the matrix of one expert."""
    first = lambda a: (ops.matmul(a["sorted x"], a["up"][0]), ops.matmul(a["sorted x"], a["gate"][0]))  # noqa: E731
    times_transposed = lambda x, bank: ops.matmul(x, ops.transpose(bank[0]))  # noqa: E731
    bank = lambda a, b: ops.matmul(ops.transpose(a), b)  # noqa: E731
    last = lambda a: ops.matmul(a["hidden"], a["down"][0])  # noqa: E731
    forward = lambda a: (*first(a), last(a))  # noqa: E731

    def backward(a):
        tokens = times_transposed(a["wide"], a["up"]), times_transposed(a["opening"], a["gate"])
        banks = bank(a["sorted x"], a["wide"]), bank(a["sorted x"], a["opening"]), bank(a["hidden"], a["sorted dy"])
        return *tokens, times_transposed(a["sorted dy"], a["down"]), *banks

    return {
        "first layer": (2, first),
        "last layer": (1, last),
        "to hidden": (1, lambda a: times_transposed(a["sorted dy"], a["down"])),
        "to tokens": (2, lambda a: (times_transposed(a["wide"], a["up"]), times_transposed(a["opening"], a["gate"]))),
        "up bank": (1, lambda a: bank(a["sorted x"], a["wide"])),
        "down bank": (1, lambda a: bank(a["hidden"], a["sorted dy"])),
        "forward": (3, forward),
        "both passes": (9, lambda a: (*forward(a), *backward(a))),
    }


def library_products():
    """Returns the grouped products of the backend's library."""

    def product(a, x, bank, transpose_rhs=False):
        return _backend.numerics.grouped_matmul(a[x], a[bank], a["rows"][3], transpose_rhs)

    return {
        "first layer": lambda a: (product(a, "sorted x", "up"), product(a, "sorted x", "gate")),
        "last layer": lambda a: product(a, "hidden", "down"),
        "to hidden": lambda a: product(a, "sorted dy", "down", True),
        "to tokens": lambda a: (product(a, "wide", "up", True), product(a, "opening", "gate", True)),
        "up bank": lambda a: _backend.numerics.grouped_matmul_weight_grad(a["sorted x"], a["wide"], a["rows"][3]),
        "down bank": lambda a: _backend.numerics.grouped_matmul_weight_grad(a["hidden"], a["sorted dy"], a["rows"][3]),
    }


def triton_products(tiles=None):
    """Returns the grouped products in Triton. They include gathers, activation, weights and sums of two products."""

    def first(a, keep):
        _, source, _, counts = a["rows"]
        return kernels.first_product(launcher(), a["x"], source, counts, a["up"], a["gate"], keep, tiles)

    def product(a, x, bank, other=None, **given):
        counts = a["rows"][3]
        return kernels.rows_product(launcher(), a[x], a[bank], counts, other, tiles=tiles, **given)

    def bank(a, x, y, *sources):
        return kernels.bank_gradient(launcher(), a[x], a[y], a["rows"][3], *sources, tiles=tiles)

    target = lambda a: a["rows"][0]  # noqa: E731
    source = lambda a: a["rows"][1]  # noqa: E731
    return {
        "first layer": lambda a: first(a, True),
        "first layer, inference": lambda a: first(a, False),
        "last layer": lambda a: product(a, "hidden", "down", target=target(a), scale=a["weights"]),
        "to hidden": lambda a: product(a, "dy", "down", transpose_rhs=True, source=source(a)),
        "to tokens": lambda a: product(
            a, "wide", "up", (a["opening"], a["gate"]), transpose_rhs=True, target=target(a)
        ),
        "up bank": lambda a: bank(a, "sorted x", "wide"),
        "up bank, gathered": lambda a: bank(a, "x", "wide", source(a)),
        "down bank": lambda a: bank(a, "hidden", "sorted dy"),
    }


def operations_between_products():
    """Returns the operations between the products, from the backend and in Triton."""
    grad_mixture = lambda a: (a["hidden"], a["wide"], a["opening"], a["weights"], a["rows"][0])  # noqa: E731
    weight = lambda a: ops.cast(a["weights"], a["x"].dtype)[..., None]  # noqa: E731

    def weighted_sum(a):
        rows = ops.take(a["sorted x"], ops.reshape(a["rows"][2], (-1,)), axis=0)
        return ops.sum(ops.reshape(rows, (*a["rows"][2].shape, -1)) * weight(a), axis=1)

    found = {
        "sorting": lambda a: tuple(sorted_by_expert(a["indices"], EXPERTS)),
        "gathering rows": lambda a: ops.take(a["x"], a["rows"][1], axis=0),
        "activation": lambda a: ops.silu(a["opening"]) * a["wide"],
        "weighted sum": weighted_sum,
    }
    if not KERNELS:
        return found
    return found | {
        "activation, Triton": lambda a: kernels.activation(launcher(), a["wide"], a["opening"]),
        "its gradient, Triton": lambda a: kernels.activation_gradient(launcher(), *grad_mixture(a)),
        "weighted sum, Triton": lambda a: kernels.combination(launcher(), a["sorted x"], a["rows"][2], a["weights"]),
    }


def mosaic_products():
    """Returns the grouped products of JAX's Hopper example, which is not a stable part of JAX.

    Raises:
        ImportError: if the installed JAX does not have them.
    """
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    rows = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=8)
    product = lambda a, x, bank, transpose_rhs=False: ragged_dot(  # noqa: E731
        a[x], a[bank], group_sizes=a["rows"][3], transpose_rhs=transpose_rhs, **rows
    )
    return {
        "last layer": lambda a: product(a, "hidden", "down"),
        "to hidden": lambda a: product(a, "sorted dy", "down", True),
        "up bank": lambda a: transposed_ragged_dot(a["sorted x"], a["wide"], group_sizes=a["rows"][3], **rows),
    }


def hugging_face(arrays, kind):
    """Returns forward and gradient of the Jamba block of transformers, including its router."""
    import torch
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock

    up, gate, down = arrays["up"], arrays["gate"], arrays["down"]
    config = JambaConfig(
        hidden_size=up.shape[1],
        intermediate_size=up.shape[2],
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        experts_implementation=kind,
    )
    with torch.device("meta"):
        block = JambaSparseMoeBlock(config)
    block = block.to_empty(device=up.device).to(up.dtype)
    with torch.no_grad():
        block.router.weight.normal_(std=up.shape[1] ** -0.5)
        block.experts.gate_up_proj.copy_(torch.cat([gate, up], dim=2).mT)
        block.experts.down_proj.copy_(down.mT)

    def forward(a):
        return block(a["x"][None])

    def gradient(a):
        with torch.enable_grad():
            x = a["x"][None].detach().requires_grad_(True)
            y = block(x)
            y = y[0] if isinstance(y, tuple) else y
        return torch.autograd.grad(y, [x, *block.parameters()], a["dy"][None])

    forward(arrays)
    return forward, gradient

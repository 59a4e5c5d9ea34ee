"""Perceptrons that each see only the tokens that were routed to them: one contract, several implementations."""

from dataclasses import dataclass

from keras import backend, ops

from keras_jamba import _backend
from keras_jamba.ops import _checks
from keras_jamba.ops._implementations import choose
from keras_jamba.ops.experts import blocks, capacity, dense, grouped, loop, native, parallel, split, triton
from keras_jamba.ops.quantization import QuantizedTensor, dequantized

# The others are given what the bits stand for.
_READS_FEW_BITS = (split, blocks)
# Fastest first on a CPU, where it can run.
_TABLE = {
    "native": native,
    "split": split,
    "loop": loop,
    "blocks": blocks,
    "dense": dense,
    "capacity": capacity,
    "grouped": grouped,
    "triton": triton,
}
# Those that let an index be the number of experts, for none; the others would look behind a bank.
_KNOW_NONE, _KNOW_NONE_ON_CPU = ("triton", "grouped", "dense"), ("loop", "blocks", "dense")
# On a GPU these go before the others, but for few bits: the others need not make all of a bank floating point at once.
_FIRST_ON_GPU = ("triton", "grouped")


@dataclass(frozen=True)
class _Call:
    """What an implementation may look at before it refuses."""

    experts: int
    per_token: int
    limited: bool = False
    platform: str = "cpu"
    tokens: int | None = None
    # Whether the banks are in few bits.
    is_quantized: bool = False
    # What is computed in, and (d, f), where they matter.
    dtype: str = "float32"
    sizes: tuple = ()


def _fastest_first(call):
    if call.platform != "gpu" or call.is_quantized:
        return _TABLE
    return {name: _TABLE[name] for name in (*_FIRST_ON_GPU, *_TABLE)}


def expert_mlp(
    tokens,
    weights,
    indices,
    up_bank,
    down_bank,
    gate_bank=None,
    *,
    capacity_factor=None,
    mask=None,
    implementation=None,
):
    """Sends every token through its k experts and sums what they make of it, weighted.

    An expert is `down(silu(gate(token)) * up(token))` with a gate bank (SwiGLU), else `down(gelu(up(token)))`.

    Args:
        tokens: `(s, d)`.
        weights: `(s, k)`, the weight of each chosen expert.
        indices: `(s, k)` integers from 0 to x - 1, the chosen experts, different in a row.
        up_bank, gate_bank: `(x, d, f)`; gate_bank may be None. Tensors, or all `ops.quantization.Quantized`, which have
            no gradient.
        down_bank: `(x, f, d)`.
        capacity_factor: None, and no token is dropped; or how many tokens an expert has room for, as a
            multiple of `s * k / x`. First choices come before second ones, earlier tokens before later ones.
        mask: `(s,)` bool or None, with a capacity: tokens where it is False take no room and get zeros.
        implementation: None for the fastest that can run, or a name.
            `"dense"`: every expert on every token, the definition.
            `"native"`: the chosen experts in C, 16 tokens at most, the steps of decoding for example; a CPU.
            `"split"`: tokens sorted by expert and split, as many products as there are experts; PyTorch, and
            TensorFlow without XLA.
            `"loop"`: tokens sorted by expert, in blocks of one expert each, block after block; JAX on a CPU.
            `"blocks"`: the same blocks side by side, in static shapes; JAX, TensorFlow, and on PyTorch a few tokens
            through banks in few bits.
            `"capacity"`: as many rows for each expert; with a capacity it is the only one.
            `"grouped"`: tokens sorted by expert, and the backend's own product of rows with the matrix of their
            group; JAX and PyTorch, and a GPU's choice.
            `"triton"`: the same with kernels in Triton; a GPU, JAX (with jax-triton) and PyTorch.

    Returns:
        `(s, d)` in the dtype of `tokens`; with a capacity, also `(s, k)` bool, which assignments found
        room. Differentiable in all but the indices.

    Raises:
        ValueError: for shapes that do not fit together, or an implementation that is unknown or cannot run.

    Reference:
        [Shazeer et al. (2017)](https://arxiv.org/abs/1701.06538); blocks of one expert each:
        [Gale et al. (2022)](https://arxiv.org/abs/2211.15841);
        capacity: [Lepikhin et al. (2020)](https://arxiv.org/abs/2006.16668).
    """
    tensors = dict(tokens=tokens, weights=weights, up_bank=up_bank, down_bank=down_bank)
    tensors |= {} if gate_bank is None else {"gate_bank": gate_bank}
    few = {name for name, x in tensors.items() if isinstance(x, QuantizedTensor)}
    tensors = {name: x if name in few else ops.convert_to_tensor(x) for name, x in tensors.items()}
    _checks.check_floating({name: x for name, x in tensors.items() if name not in few})
    indices = ops.convert_to_tensor(indices)
    others = {"indices": indices} | ({} if mask is None else {"mask": mask})
    shapes = {"tokens": "sd", "weights": "sk", "indices": "sk", "up_bank": "xdf", "down_bank": "xfd", "mask": "s"}
    _checks.check_shapes(tensors | others, shapes | {"gate_bank": "xdf"})
    if mask is not None and capacity_factor is None:
        raise ValueError(
            "Only with a capacity does a mask change anything. Received: a mask and capacity_factor=None. Leave it out."
        )
    limits = {}
    if capacity_factor is not None:
        _checks.check_number("capacity_factor", capacity_factor, low=1e-3)
        limits = dict(capacity_factor=capacity_factor, mask=mask)
    if not limits and implementation is None and parallel.devices(tokens.shape[0], up_bank.shape[0]):
        banks = {name: tensors.pop(name) for name in list(tensors) if name.endswith("bank")}
        return parallel.run(_own_experts, **tensors, indices=indices, banks=banks)
    call = _call(tensors, indices, few, bool(limits))
    return _chosen(_fastest_first(call), implementation, call, tensors, indices, limits)


def _chosen(table, implementation, call, tensors, indices, limits):
    chosen = choose("expert_mlp", table, implementation, call)
    if chosen not in _READS_FEW_BITS:
        few = {name for name, x in tensors.items() if isinstance(x, QuantizedTensor)}
        tensors = tensors | {name: dequantized(tensors[name], tensors["tokens"].dtype) for name in few}
    return chosen.run(indices=indices, **{"gate_bank": None} | tensors, **limits)


def _call(tensors, indices, few=(), limited=False):
    platform, count = _backend.tensors.platform(tensors["tokens"]), tensors["tokens"].shape[0]
    (experts, d, f), dtype = tensors["up_bank"].shape, _dtype(tensors, few)
    return _Call(experts, indices.shape[1], limited, platform, count, bool(few), dtype, (d, f))


def _own_experts(indices, **tensors):
    """The part of some experts, where an index that is their number stands for none of them."""
    call = _call(tensors, indices, {name for name, x in tensors.items() if isinstance(x, QuantizedTensor)})
    table = {name: _TABLE[name] for name in (_KNOW_NONE_ON_CPU if call.platform == "cpu" else _KNOW_NONE)}
    return _chosen(table, None, call, tensors, indices, {})


def _dtype(tensors, few):
    """What the products are computed in: few bits become what the tokens are."""
    return backend.result_type(*(x.dtype for name, x in tensors.items() if name not in {*few, "weights"}))

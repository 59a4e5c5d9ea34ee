"""The expert perceptrons of a mixture of experts: one function, several implementations."""

from dataclasses import dataclass

from keras import backend, ops

from keras_jamba import _backend
from keras_jamba._typing import Tensor, Tensors
from keras_jamba.ops import _checks
from keras_jamba.ops._implementations import choose
from keras_jamba.ops.experts import blocks, capacity, dense, grouped, loop, native, parallel, split, triton
from keras_jamba.ops.quantization import QuantizedTensor, dequantized

# These read quantized banks; the others get dequantized banks.
_READS_QUANTIZED = (split, blocks)
# Fastest first on a CPU, among those that can run.
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
# These accept the index x, for no expert; the others would read past the end of a bank.
_ACCEPTS_NO_EXPERT, _ACCEPTS_NO_EXPERT_ON_CPU = ("triton", "grouped", "dense"), ("loop", "blocks", "dense")
# On a GPU these come first, except for quantized banks, which the others need not dequantize all at once.
_FIRST_ON_GPU = ("triton", "grouped")


@dataclass(frozen=True)
class _Call:
    """Properties of a call that `why_not` reads."""

    experts: int
    per_token: int
    limited: bool = False
    platform: str = "cpu"
    tokens: int | None = None
    is_quantized: bool = False
    # The dtype of the products, and (d, f).
    dtype: str = "float32"
    sizes: tuple = ()


def _fastest_first(call):
    if _backend.compilation.needs_portable_operations((call.tokens,)):
        # The others sort, wait for counts, or compare sizes.
        return {"dense": dense} | _TABLE
    if call.platform != "gpu" or call.is_quantized:
        return _TABLE
    return {name: _TABLE[name] for name in (*_FIRST_ON_GPU, *_TABLE)}


def expert_mlp(
    tokens: Tensor,
    weights: Tensor,
    indices: Tensor,
    up_bank: Tensor | QuantizedTensor,
    down_bank: Tensor | QuantizedTensor,
    gate_bank: Tensor | QuantizedTensor | None = None,
    *,
    capacity_factor: float | None = None,
    mask: Tensor | None = None,
    implementation: str | None = None,
) -> Tensors:
    """Computes the weighted sum of k expert perceptrons per token.

    An expert is `down(silu(gate(token)) * up(token))` with a gate bank (SwiGLU), else `down(gelu(up(token)))`.
    Differentiable in all tensors except the indices.

    Args:
        tokens: `(s, d)`.
        weights: `(s, k)`, the weight of each chosen expert.
        indices: `(s, k)` integers from 0 to x - 1, the chosen experts, distinct per token.
        up_bank, gate_bank: `(x, d, f)`; gate_bank may be None. Tensors, or all `ops.quantization.QuantizedTensor`,
            which have no gradient.
        down_bank: `(x, f, d)`, as up_bank.
        capacity_factor: None to drop no token, or the capacity of each expert as a multiple of `s * k / x`
            assignments. First choices precede second choices, then earlier tokens precede later ones.
        mask: `(s,)` bool or None, only with `capacity_factor`. Tokens where it is False use no capacity and get zeros.
        implementation: None for the fastest that can run, or a name:

            - `"dense"`: applies every expert to every token, as defined.
            - `"native"`: the chosen experts in C, for at most 16 tokens, as in decoding; on a CPU.
            - `"split"`: sorts tokens by expert and multiplies once per expert; PyTorch, and TensorFlow without XLA.
            - `"loop"`: sorts tokens by expert into blocks of one expert, and loops over the blocks; JAX on a CPU.
            - `"blocks"`: multiplies the same blocks in one batch of static shape; JAX and TensorFlow, and on PyTorch
              a few tokens with quantized banks.
            - `"capacity"`: the same number of rows per expert; the only one that supports `capacity_factor`.
            - `"grouped"`: sorts tokens by expert and uses the backend's grouped matrix product; JAX and PyTorch,
              preferred on a GPU.
            - `"triton"`: as `"grouped"`, with Triton kernels; on a GPU, JAX (with jax-triton) and PyTorch.

    Returns:
        `(s, d)` in the dtype of `tokens`. With `capacity_factor`, that and `(s, k)` bool: whether each assignment
        was within its expert's capacity.

    Raises:
        ValueError: if shapes do not match, if `mask` lacks a `capacity_factor`, or if the implementation is unknown
            or cannot run.

    Reference:
        [Shazeer et al. (2017)](https://arxiv.org/abs/1701.06538); blocks of one expert each:
        [Gale et al. (2022)](https://arxiv.org/abs/2211.15841);
        capacity: [Lepikhin et al. (2020)](https://arxiv.org/abs/2006.16668).
    """
    tensors = dict(tokens=tokens, weights=weights, up_bank=up_bank, down_bank=down_bank)
    _checks.check_given(tensors | {"indices": indices}, (*tensors, "indices"))
    tensors |= {} if gate_bank is None else {"gate_bank": gate_bank}
    quantized = {name for name, x in tensors.items() if isinstance(x, QuantizedTensor)}
    tensors = {name: x if name in quantized else ops.convert_to_tensor(x) for name, x in tensors.items()}
    _checks.check_floating({name: x for name, x in tensors.items() if name not in quantized})
    indices = ops.convert_to_tensor(indices)
    others = {"indices": indices} | ({} if mask is None else {"mask": mask})
    shapes = {"tokens": "sd", "weights": "sk", "indices": "sk", "up_bank": "xdf", "down_bank": "xfd", "mask": "s"}
    _checks.check_shapes(tensors | others, shapes | {"gate_bank": "xdf"})
    if mask is not None and capacity_factor is None:
        raise ValueError(
            "mask requires a capacity_factor. Received: a mask and capacity_factor=None. Remove the mask: without a "
            "capacity it has no effect."
        )
    limits = {}
    if capacity_factor is not None:
        _checks.check_number("capacity_factor", capacity_factor, low=1e-3)
        limits = dict(capacity_factor=capacity_factor, mask=mask)
    if not limits and implementation is None and parallel.devices(tokens.shape[0], up_bank.shape[0]):
        banks = {name: tensors.pop(name) for name in list(tensors) if name.endswith("bank")}
        return parallel.run(_own_experts, **tensors, indices=indices, banks=banks)
    call = _call(tensors, indices, quantized, bool(limits))
    return _chosen(_fastest_first(call), implementation, call, tensors, indices, limits)


def _chosen(table, implementation, call, tensors, indices, limits):
    chosen = choose("expert_mlp", table, implementation, call)
    if not (limits or _backend.tensors.has_values(tensors["tokens"])):
        return ops.zeros_like(tensors["tokens"])
    if chosen not in _READS_QUANTIZED:
        quantized = {name for name, x in tensors.items() if isinstance(x, QuantizedTensor)}
        tensors = tensors | {name: dequantized(tensors[name], tensors["tokens"].dtype) for name in quantized}
    return chosen.run(indices=indices, **{"gate_bank": None} | tensors, **limits)


def _call(tensors, indices, quantized=(), limited=False):
    platform, count = _backend.tensors.platform(tensors["tokens"]), tensors["tokens"].shape[0]
    (experts, d, f), dtype = tensors["up_bank"].shape, _dtype(tensors, quantized)
    return _Call(experts, indices.shape[1], limited, platform, count, bool(quantized), dtype, (d, f))


def _own_experts(indices, **tensors):
    """Computes the contribution of one device's experts; the index x of a local bank means no expert."""
    call = _call(tensors, indices, {name for name, x in tensors.items() if isinstance(x, QuantizedTensor)})
    names = _ACCEPTS_NO_EXPERT_ON_CPU if call.platform == "cpu" else _ACCEPTS_NO_EXPERT
    table = {name: _TABLE[name] for name in names}
    return _chosen(table, None, call, tensors, indices, {})


def _dtype(tensors, quantized):
    """Returns the dtype of the products; quantized banks take the dtype of the tokens."""
    return backend.result_type(*(x.dtype for name, x in tensors.items() if name not in {*quantized, "weights"}))

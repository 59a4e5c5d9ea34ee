"""Matrix products and norms, on PyTorch."""

import keras
import torch
from torch.nn import functional

from keras_jamba._backend.torch._cross_entropy import cross_entropy_gradient, cross_entropy_of_rows  # noqa: F401
from keras_jamba._backend.torch._norm import rms_norm  # noqa: F401
from keras_jamba._backend.torch._plain import is_here, is_plain
from keras_jamba._backend.torch._swiglu import swiglu  # noqa: F401


def matmul(x, y):
    # Keras' function promotes dtypes, which takes as long as the launch. On a CPU it multiplies float16 in float32.
    alike = is_here(x) and is_plain(y) and x.dtype is y.dtype and x.device == y.device
    return x @ y if alike and (x.is_cuda or x.dtype is not torch.float16) else keras.ops.matmul(x, y)


def matmul_in_float32(x, y):
    return torch.mm(x, y, out_dtype=torch.float32) if x.is_cuda else torch.mm(x, y).float()


def add_matmul(total, x, y):
    if x.dtype is total.dtype:
        return total.addmm_(x, y)
    if x.is_cuda and x.dtype.itemsize == 2 and hasattr(torch.ops.aten.addmm, "dtype_out"):
        return torch.addmm(total, x, y, out_dtype=torch.float32, out=total)
    return total.add_(matmul_in_float32(x, y) if x.dtype.itemsize == 2 else torch.mm(x, y))


def plus_matmul(y, x, matrix):
    rows = lambda each: each.reshape(-1, each.shape[-1])  # noqa: E731
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return y + x @ matrix  # a transform may batch any of them
    # In place, because PyTorch would copy y first.
    return rows(y).addmm_(rows(x), matrix).reshape(y.shape)


def grouped_matmul(x, bank, counts, transpose_rhs=False):
    return functional.grouped_mm(x, bank.mT if transpose_rhs else bank, offs=_ends(counts))


def grouped_matmul_weight_grad(a, b, counts):
    return functional.grouped_mm(a.mT, b, offs=_ends(counts))


def why_no_grouped_matmul(platform, dtype, sizes):
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    if any(each * size % 16 for each in sizes):
        return f"PyTorch needs rows of a multiple of 16 bytes, and these have {' and '.join(map(str, sizes))} {dtype}"
    if platform == "gpu" and (dtype != "bfloat16" or torch.cuda.get_device_capability()[0] not in (9, 10)):
        return "PyTorch waits for the counts, as 'split' does, except for bfloat16 on a GPU of capability 9 or 10"
    return None


def prefers_grouped_matmul():
    return True


def has_fused_attention():
    return True


def unmasked_attention(query, key, value, causal):
    if not _has_grouped_attention(query):
        return keras.ops.dot_product_attention(query, *_repeated(query, key, value), is_causal=causal)
    # Keras' function insists on FlashAttention 2, and copies keys and values for each head. cuDNN's is faster.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    grouped = key.shape[1] < query.shape[1]
    outputs = functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
    return outputs.transpose(1, 2)


def _has_grouped_attention(query):
    """Returns whether PyTorch has a kernel with grouped heads for a query, not only one for all pairs of tokens."""
    short = query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] <= 256
    return query.is_cuda and short and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _repeated(query, key, value):
    """Returns a single key-value head once per head of the queries: Keras' function does so for several only."""
    return (x.expand(-1, -1, query.shape[2], -1) if x.shape[2] == 1 else x for x in (key, value))


def masked_attention(query, key, value, mask):
    # keras.ops.dot_product_attention makes all three contiguous, which copies a cache in each step of generation.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if key.shape[1] < query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    # Not -inf, which gives NaN for a query that sees no key.
    scores = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min / 2)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=scores).transpose(1, 2)


def _ends(counts):
    return counts.cumsum(0, dtype=torch.int32)

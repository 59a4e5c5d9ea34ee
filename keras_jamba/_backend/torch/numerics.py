"""Matrix products and norms, on PyTorch."""

import torch
from torch.nn import functional

from keras_jamba._backend.torch._norm import rms_norm  # noqa: F401


def matmul_in_float32(x, y):
    return torch.mm(x, y, out_dtype=torch.float32) if x.is_cuda else torch.mm(x, y).float()


def add_matmul(total, x, y):
    return total.addmm_(x, y) if x.dtype is total.dtype else total.add_(matmul_in_float32(x, y))


def cross_entropy_gradient(logits, logs, targets, factors):
    grads = logits.sub_(logs[:, None]).exp_()
    places = targets[:, None].long()
    return grads.scatter_add_(1, places, -torch.ones_like(places, dtype=grads.dtype)).mul_(factors[:, None])


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

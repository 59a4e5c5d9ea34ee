"""Products of rows sorted by group on PyTorch."""

import torch
from torch.nn import functional


def grouped_product(x, bank, counts, turned=False):
    return functional.grouped_mm(x, bank.mT if turned else bank, offs=_ends(counts))


def grouped_sum(a, b, counts):
    return functional.grouped_mm(a.mT, b, offs=_ends(counts))


def why_not_grouped(platform, dtype, sizes):
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    if any(each * size % 16 for each in sizes):
        return f"PyTorch wants rows of a multiple of 16 bytes, and these have {' and '.join(map(str, sizes))} {dtype}"
    if platform == "gpu" and (dtype != "bfloat16" or torch.cuda.get_device_capability()[0] not in (9, 10)):
        return "but for bfloat16 on a GPU of capability 9 or 10 PyTorch waits for the counts, as 'split' does"
    return None


def _ends(counts):
    return counts.cumsum(0, dtype=torch.int32)

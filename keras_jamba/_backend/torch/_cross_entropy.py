"""Cross-entropy of float32 logits on PyTorch: Triton kernels, which read the logits once, and PyTorch's functions."""

import torch

from keras_jamba._backend.torch import _triton
from keras_jamba._triton import cross_entropy


def cross_entropy_of_rows(logits, targets):
    if _uses_kernels(logits):
        return tuple(cross_entropy.of_rows(_triton._gpu(), logits.contiguous(), targets.int().contiguous()))
    logs = logits.logsumexp(-1)
    of_target = logits.gather(1, targets[:, None].long())[:, 0]
    return logs, logs - of_target, logits.argmax(-1).int()


def cross_entropy_gradient(logits, logs, targets, factors, dtype):
    dtype = getattr(torch, dtype)
    if _uses_kernels(logits):
        rest = logs, targets.int(), factors.float()
        return cross_entropy.gradient(_triton._gpu(), logits.contiguous(), *(x.contiguous() for x in rest), dtype)
    grads = logits.sub_(logs[:, None]).exp_()
    places = targets[:, None].long()
    grads = grads.scatter_add_(1, places, -torch.ones_like(places, dtype=grads.dtype)).mul_(factors[:, None])
    return grads.to(dtype)


def _uses_kernels(logits):
    return (
        logits.is_cuda
        and logits.dtype == torch.float32
        and _triton.can_differentiate()
        and _triton.kernels_run(logits.device)
    )

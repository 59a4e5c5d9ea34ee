"""Trainer functions on PyTorch."""

import torch

from keras_jamba._backend.common.trainer import Loop, local_batch, readable_values, runs_step_without_data  # noqa: F401
from keras_jamba._backend.torch._cuda_graph import on_weights_replaced, with_cuda_graph  # noqa: F401
from keras_jamba._keras_internals import get_keras_mask


class TrainerLoops:
    pass


def can_bypass_layer_call(layer, x):
    # Tensor subclasses may override operations. Only `Module.__call__` runs hooks.
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and layer.built
        and x.dtype is getattr(torch, layer.compute_dtype)
        and not has_call_hooks(layer)
        and get_keras_mask(x) is None
        and layer.activity_regularizer is None
    )


def has_call_hooks(layer):
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def first_batch(given, check, steps):
    (data,) = given
    check(data[0])
    return given

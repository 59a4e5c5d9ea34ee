"""Trainer functions on PyTorch."""

import torch

from keras_jamba._backend.common.trainer import Loop, local_batch, readable_values, runs_step_without_data  # noqa: F401
from keras_jamba._backend.torch._cuda_graph import on_weights_replaced, with_cuda_graph  # noqa: F401
from keras_jamba._backend.torch._plain import is_here
from keras_jamba._keras_internals import get_keras_mask, is_rematerialized


class TrainerLoops:
    pass


def can_bypass_layer_call(layer, *args, **kwargs):
    # Only `Module.__call__` runs hooks and compiled modules.
    if (
        not args
        or not layer._is_of_package
        or not layer.built
        or has_call_hooks(layer)
        or layer._compiled_call_impl is not None
    ):
        return False
    if layer.activity_regularizer is not None or is_rematerialized(layer):
        return False
    dtype = getattr(torch, layer.compute_dtype)
    inputs = all(is_here(x) and x.dtype is dtype and get_keras_mask(x) is None for x in args)
    return inputs and all(_needs_no_conversion(x, dtype if layer.autocast else None) for x in kwargs.values())


def _needs_no_conversion(x, dtype):
    """Returns whether Keras passes an argument unchanged; dtype is that of floating-point tensors, None for any."""
    if x is None or isinstance(x, bool):
        return True
    if isinstance(x, dict):
        return all(_needs_no_conversion(leaf, dtype) for leaf in x.values())
    return is_here(x) and (dtype in (None, x.dtype) or not x.is_floating_point())


def has_call_hooks(layer):
    of_layer = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(of_layer or torch.nn.modules.module._has_any_global_hook())


def first_batch(given, check, steps):
    (data,) = given
    check(data[0])
    return given

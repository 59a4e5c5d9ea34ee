"""Tensors that Keras' operations neither move nor treat specially, on PyTorch."""

import torch

from keras_jamba._keras_internals import torch_device


def is_plain(x):
    """Returns whether x is a tensor of no subclass, which may override operations."""
    return type(x) in (torch.Tensor, torch.nn.Parameter)


def is_here(x):
    """Returns whether x is a plain tensor on the device on which Keras creates tensors, to which it moves others."""
    if not is_plain(x):
        return False
    device, default = x.device, str(torch_device())
    if device.type != "cuda" or ":" in default:
        return str(device) == default
    return default == "cuda" and device.index == torch.cuda.current_device()

"""Sharding on PyTorch, where Keras splits no tensors."""

import torch

from keras_jamba._backend.common import unsharded
from keras_jamba._backend.common.unsharded import (  # noqa: F401
    active_mesh,
    all_gather_weight,
    all_to_all,
    pmax,
    shard_map,
    sharded_full,
    supports_model_parallel,
    to_default_device,
    to_numpy,
    with_sharding_constraint,
)


def why_not_sharded(model):
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        if any(isinstance(module, FSDPModule) for module in model.modules()):
            return "fully_shard splits the modules' parameters, and Keras' variables stay unsharded and get no gradient"
    return unsharded.why_not_sharded(model)

"""Processes and replicas on PyTorch: torchrun starts them, and DistributedDataParallel wraps a Keras model."""

import os

import torch

from keras_jamba._backend.common.combined_gradients import all_reduce_sum  # noqa: F401
from keras_jamba._backend.common.unsplit_variables import assign_from_shards, local_shards  # noqa: F401


def process_index():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def process_count():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def all_gather_int(number):
    found = [number] * process_count()
    if len(found) > 1:
        torch.distributed.all_gather_object(found, number)
    return found


class DataParallel:
    def __init__(self, devices):
        if devices is not None:
            raise ValueError(
                "On PyTorch, torchrun assigns a device to each process. "
                f"Received: devices={devices!r}. Leave it out, and start with torchrun --nproc-per-node N program.py."
            )
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing and not torch.distributed.is_initialized():
            raise RuntimeError(
                "On PyTorch, replicas are processes of one group, which torchrun starts. "
                f"Received: an environment without {missing}. Start with torchrun --nproc-per-node N program.py."
            )
        self._initialized_here = not torch.distributed.is_initialized()
        if self._initialized_here:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self.replicas = torch.distributed.get_world_size()
        self.shard = (torch.distributed.get_rank(), self.replicas)

    def __enter__(self):
        pass

    def __exit__(self, *exception):
        if self._initialized_here:
            torch.distributed.destroy_process_group()

    def prepare(self, model):
        shared = torch.nn.parallel.DistributedDataParallel(_CalledModel(model))
        proxy = _ModelProxy(model, shared)
        model.train_step = lambda data: type(model).train_step(proxy, data)
        return model


class _CalledModel(torch.nn.Module):
    """A module that calls the model. The model's own `forward` skips `__call__` of Keras."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class _ModelProxy:
    """A proxy of the model for `train_step`, whose calls go through DistributedDataParallel."""

    def __init__(self, model, shared):
        self._model, self._shared = model, shared

    def __call__(self, *args, **kwargs):
        return self._shared(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._model, name)

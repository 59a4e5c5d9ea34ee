"""Processes that train together, on PyTorch: torchrun starts them, DistributedDataParallel is around a Keras model."""

import os

import torch

from keras_jamba._backend.common.combined_gradients import all_reduce_sum  # noqa: F401
from keras_jamba._backend.common.whole_variables import assign_from_shards, local_shards  # noqa: F401


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
                "On PyTorch torchrun gives each process its device. "
                f"Received: devices={devices!r}. Leave it out, and say torchrun --nproc-per-node N program.py."
            )
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing and not torch.distributed.is_initialized():
            raise RuntimeError(
                "On PyTorch replicas are processes that know each other. "
                f"Received: an environment without {missing}. Start with torchrun --nproc-per-node N program.py."
            )
        self._begun_here = not torch.distributed.is_initialized()
        if self._begun_here:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self.replicas = torch.distributed.get_world_size()
        self.shard = (torch.distributed.get_rank(), self.replicas)

    def __enter__(self):
        pass

    def __exit__(self, *exception):
        if self._begun_here:
            torch.distributed.destroy_process_group()

    def prepare(self, model):
        shared = torch.nn.parallel.DistributedDataParallel(_Called(model))
        stand_in = _StandIn(model, shared)
        model.train_step = lambda data: type(model).train_step(stand_in, data)
        return model


class _Called(torch.nn.Module):
    """The model as Keras calls it: its own `forward` leaves out what Keras does around a call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class _StandIn:
    """The model, but for its call, which goes through DistributedDataParallel: what Keras' own step sees as `self`."""

    def __init__(self, model, shared):
        self._model, self._shared = model, shared

    def __call__(self, *args, **kwargs):
        return self._shared(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._model, name)

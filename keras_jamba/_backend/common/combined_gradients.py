"""Reductions on backends that combine the replicas' gradients before the optimizer step."""


def all_reduce_sum(tensors):
    return tensors

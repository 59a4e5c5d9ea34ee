"""Replicas whose gradients the backend combines before an optimizer sees them."""


def all_reduce_sum(tensors):
    return tensors

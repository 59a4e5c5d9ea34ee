"""Tensor functions that several backends share."""


def is_traced_by_torchscript():
    return False


def has_values(x):
    return True


def can_log():
    return True


def ensure_shape(x, shape):
    return x

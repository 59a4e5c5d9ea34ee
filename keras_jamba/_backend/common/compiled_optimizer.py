"""Optimizer functions for backends that compile the complete training step."""

from keras import ops

from keras_jamba._backend.common.unavailable import refuse

_OWN_STEP = "Keras' own step is part of a compiled function"


def global_norm(tensors):
    squares = [ops.sum(ops.square(ops.cast(x, "float32"))) for x in tensors]
    return ops.sqrt(ops.sum(ops.stack(squares)))


def scale_gradients(tensors, factor):
    return [x if x is None else ops.multiply(x, ops.cast(factor, x.dtype)) for x in tensors]


def has_fused_adamw():
    return False


def fused_adamw(weights, gradients, momentums, velocities, maxima, *, step, rate, betas, epsilon, decay):
    refuse("fused_adamw", _OWN_STEP, "has_fused_adamw()")


def move_averages(pairs, share):
    refuse("move_averages", _OWN_STEP, "has_fused_adamw()")


class HostStepCounter:
    def __init__(self):
        refuse("HostStepCounter", _OWN_STEP, "has_fused_adamw()")

    def read(self, variable):
        refuse("HostStepCounter", _OWN_STEP, "has_fused_adamw()")

    def keep(self, variable, value):
        refuse("HostStepCounter", _OWN_STEP, "has_fused_adamw()")

"""Optimizer functions on TensorFlow, which compiles the complete training step into a graph."""

from keras_jamba._backend.common.compiled_optimizer import (  # noqa: F401
    HostStepCounter,
    fused_adamw,
    global_norm,
    has_fused_adamw,
    move_averages,
    scale_gradients,
)

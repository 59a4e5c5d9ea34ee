"""Optimizer functions on JAX, which compiles the complete training step."""

from keras_jamba._backend.common.compiled_optimizer import (  # noqa: F401
    HostStepCounter,
    fused_adamw,
    global_norm,
    has_fused_adamw,
    move_averages,
    scale_gradients,
)

"""What an optimizer does to all weights, on TensorFlow: a graph holds a step as a whole."""

from keras_jamba._backend.common.compiled_optimizer import (  # noqa: F401
    HostStepCounter,
    fused_adamw,
    global_norm,
    has_fused_adamw,
    scale_gradients,
)

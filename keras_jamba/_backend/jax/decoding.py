"""Kernels for few tokens: none. XLA fuses these operations itself."""

from keras_jamba._backend.common.no_decoding import (  # noqa: F401
    added_norm,
    applies,
    convolution_step,
    gated_product,
    norm,
    norms_of_slices,
    product,
    scan_step,
    ssm_step,
)

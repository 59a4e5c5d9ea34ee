"""RMSNorm of many narrow rows against float64. On PyTorch with a GPU it trains with Triton kernels."""

import numpy as np
import pytest
from checks import close, gradients, numpy
from keras import ops

from keras_jamba import _backend

EPSILON = 1e-3


@pytest.mark.parametrize("shape", [(3, 1024, 40), (2100, 3), (5, 33)])
def test_norms_and_their_gradients_equal_float64(shape):
    rng = np.random.default_rng(0)
    x, weight, scale = (rng.standard_normal(size).astype("float32") for size in (shape, shape, shape[-1:]))

    def norm(x, scale):
        return _backend.numerics.rms_norm(x, scale=scale, epsilon=EPSILON)

    inverse = 1 / np.sqrt((x.astype("float64") ** 2).mean(-1, keepdims=True) + EPSILON)
    close(numpy(norm(ops.convert_to_tensor(x), ops.convert_to_tensor(scale))), x * inverse * scale, absolute=1e-5)
    normed, grad = x * inverse, weight * scale
    expected = inverse * (grad - normed * (grad * normed).mean(-1, keepdims=True))
    found = gradients(lambda x, scale: ops.sum(ops.multiply(norm(x, scale), weight)), [x, scale])
    close(found[0], expected, absolute=1e-5)
    close(found[1], (weight * normed).reshape(-1, shape[-1]).sum(0), relative=1e-3, absolute=1e-3)

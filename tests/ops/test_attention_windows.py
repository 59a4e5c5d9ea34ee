"""Windows of attention at the limits of positions."""

import numpy as np
from checks import close, numpy

from keras_jamba.ops import grouped_query_attention


def test_the_largest_window_hides_no_key_from_negative_positions():
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 4)).astype("float32")
    windows = 2**20, 2**31 - 1
    near, far = (
        numpy(grouped_query_attention(x, x, x, True, offset=-2, window=window, implementation="dense"))
        for window in windows
    )
    close(far, near, relative=1e-6, absolute=1e-6)

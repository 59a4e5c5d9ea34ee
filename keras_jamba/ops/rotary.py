"""Rotary position embedding."""

from keras import ops

from keras_jamba.ops import _checks


def rotary_embedding(x, positions=0, theta=10000.0, interleaved=True):
    """Turns every pair of features by an angle that grows with the position.

    Pair k of a head of width c at position m is the complex number that is multiplied by
    `exp(i * m * theta ** (-2k / c))`. Angles are float32 whatever the dtype of x.

    Args:
        x: `(b, t, h, c)` queries or keys, c even.
        positions: integers `(b, t)`, the position of each token; or a number, that of the first token.
        theta: base of the frequencies.
        interleaved: whether a pair is two neighbours, features 2k and 2k + 1 (Su et al., the seed of
            this project), or features k and k + c/2 (GPT-NeoX, Llama in transformers).

    Returns:
        `(b, t, h, c)` in the dtype of x.

    Raises:
        ValueError: if x is not a floating tensor of four axes with an even last one.

    Reference:
        [Su et al. (2021)](https://arxiv.org/abs/2104.09864), equation 34.
    """
    x = ops.convert_to_tensor(x)
    _checks.check_floating({"x": x})
    if len(x.shape) != 4 or x.shape[-1] % 2:
        raise ValueError(
            "x must have the shape (b, t, h, c) with an even head width c. "
            f"Received: x.shape={tuple(x.shape)}. Choose num_heads so that d_model / num_heads is even."
        )
    half = x.shape[-1] // 2
    frequencies = ops.power(float(theta), -ops.arange(half, dtype="float32") / half)
    if isinstance(positions, int):
        positions = (ops.arange(ops.shape(x)[1]) + positions)[None]
    angles = ops.cast(positions, "float32")[:, :, None, None] * frequencies
    cos, sin = ops.cos(angles), ops.sin(angles)
    real, imaginary = _split(ops.cast(x, "float32"), interleaved)
    turned = real * cos - imaginary * sin, real * sin + imaginary * cos
    joined = ops.stack(turned, axis=-1) if interleaved else ops.concatenate(turned, axis=-1)
    return ops.cast(ops.reshape(joined, ops.shape(x)), x.dtype)


def _split(x, interleaved):
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    return ops.split(x, 2, axis=-1)

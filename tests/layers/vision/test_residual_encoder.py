"""The residual encoder against NumPy in float64."""

import keras
import numpy as np
import pytest
from checks import close, numpy

import keras_jamba
from keras_jamba import layers, training
from keras_jamba.estimation import model_report


def convolution(x, kernel, stride):
    """Returns a 3x3 convolution `(b, ceil(h / stride), ceil(w / stride), c)` with "same" padding."""
    sides = [-(-side // stride) for side in x.shape[1:3]]
    missing = [max(0, (n - 1) * stride + 3 - side) for n, side in zip(sides, x.shape[1:3], strict=True)]
    x = np.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel)


def normed(x, norm):
    gamma, beta, mean, variance = (numpy(v).astype("float64") for v in norm.weights)
    return gamma * (x - mean) / np.sqrt(variance + norm.epsilon) + beta


def silu(x):
    return x / (1 + np.exp(-x))


def expected(encoder, images):
    parts = iter(zip(encoder.convolutions, encoder.norms, strict=True))

    def step(x):
        convolution_layer, norm = next(parts)
        kernel = numpy(convolution_layer.kernel).astype("float64")
        return normed(convolution(x, kernel, convolution_layer.strides[0]), norm)

    x = images.astype("float64")
    for _ in range(encoder.downsample.bit_length()):
        x = silu(step(x))
        for _ in range(encoder.blocks):
            y = silu(step(x))
            x = silu(x + step(y))
    return x


@pytest.mark.parametrize(("downsample", "blocks"), [(1, 1), (2, 2), (4, 1)])
def test_stages_of_residual_blocks_equal_numpy(downsample, blocks):
    rng = np.random.default_rng(0)
    encoder = layers.ResidualEncoder(80, downsample, blocks)
    images = rng.standard_normal((2, 9, 6, 3)).astype("float32")
    encoder.build(images.shape)
    for norm in encoder.norms:
        norm.set_weights([1 + 0.3 * rng.random(v.shape) for v in norm.weights])
    found = numpy(encoder(images))
    assert found.shape == encoder.compute_output_shape(images.shape)
    close(found, expected(encoder, images), absolute=1e-4)


def test_stages_double_their_width_up_to_that_of_the_model():
    widths = lambda *given: [each.filters for each in layers.ResidualEncoder(*given).convolutions]  # noqa: E731
    assert widths(128, 4) == [32] * 3 + [64] * 3 + [128] * 3
    assert widths(96, 4, 2) == [32] * 5 + [48] * 5 + [96] * 5
    assert widths(16, 2) == [16] * 6


def test_weight_decay_applies_to_the_kernels():
    model = keras_jamba.DHCJamba(stem="residual", d_model=16, num_layers=1, mamba_ratio=None, moe_frequency=0)
    decayed = training.optimizer(model, steps=1).decayed(model.encoder.trainable_variables)
    assert [id(v) for v in decayed] == [id(each.kernel) for each in model.encoder.convolutions]


def test_the_stem_of_a_model_has_the_blocks_of_its_argument():
    model = keras_jamba.DHCJamba(
        stem="residual", stem_blocks=2, d_model=16, num_layers=1, mamba_ratio=None, moe_frequency=0
    )
    assert isinstance(model.encoder, layers.ResidualEncoder) and model.encoder.blocks == 2
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    assert again.encoder.blocks == 2 and again.count_params() == model.count_params()


@pytest.mark.parametrize("blocks", [0, "2"])
def test_blocks_are_checked_for_every_stem_and_refused_without_residual_blocks(blocks):
    for stem in ("conv", "residual"):
        with pytest.raises(ValueError, match="stem_blocks must be an integer of at least 1. Received"):
            keras_jamba.DHCJamba(stem=stem, stem_blocks=blocks)
    with pytest.raises(ValueError, match="Only the stem 'residual' has blocks. Received: stem_blocks=2.*'conv'"):
        keras_jamba.DHCJamba(stem_blocks=2)


@pytest.mark.parametrize("stem", ["conv", "residual"])
def test_a_report_refuses_the_sizes_that_the_model_refuses(stem):
    with pytest.raises(ValueError, match="downsample must be a power of two. Received: downsample=3"):
        model_report(dict(stem=stem, downsample=3, image_shape=(32, 32, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"downsample": 3}, "downsample must be a power of two. Received: downsample=3"),
        ({"blocks": 0}, "blocks must be an integer of at least 1. Received: blocks=0"),
    ],
)
def test_other_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        layers.ResidualEncoder(8, **arguments)

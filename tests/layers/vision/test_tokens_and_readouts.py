"""Encoders, tokens and readouts against NumPy, and the mixer without a state space."""

import keras
import numpy as np
import pytest
from checks import close, jitted, numpy
from keras import ops

from keras_jamba import layers

RANDOM = np.random.default_rng(0)


@pytest.fixture
def clips():
    return RANDOM.standard_normal((2, 3, 6, 4, 5)).astype("float32")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_frames_are_encoded_like_single_images(clips):
    for encoder in (layers.SpatialEncoder(8, 2), layers.ResidualEncoder(8, 2), layers.PatchEncoder(8, 4)):
        images = clips.reshape(6, 6, 4, 5)
        grids = numpy(encoder(clips))
        assert grids.shape == encoder.compute_output_shape(clips.shape)
        close(grids.reshape(6, *grids.shape[2:]), numpy(encoder(images)), absolute=1e-5)


def test_a_patch_is_projected_and_normalised():
    encoder = layers.PatchEncoder(8, 3)
    images = RANDOM.standard_normal((2, 6, 9, 2)).astype("float32")
    outputs = numpy(encoder(images))
    kernel, bias = numpy(list(encoder.projection.weights))
    patches = images.reshape(2, 2, 3, 3, 3, 2).transpose(0, 1, 3, 2, 4, 5)
    expected = np.einsum("bhwijc,ijcd->bhwd", patches, kernel) + bias
    expected /= np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-6)
    close(outputs, expected, absolute=1e-5)


@pytest.mark.parametrize("encoder", [layers.SpatialEncoder, layers.ResidualEncoder, layers.PatchEncoder])
def test_an_encoder_reports_a_missing_axis(encoder):
    with pytest.raises(ValueError, match=r"\(b, T, H, W, C\) for clips. Received: shape=\(8, 8, 3\)"):
        encoder(8).build((8, 8, 3))


def test_snake_order_reads_every_other_row_backwards():
    cells = np.arange(9, dtype="float32").reshape(1, 3, 3, 1)
    assert numpy(layers.GridTokens("row")(cells)).ravel().tolist() == list(range(9))
    snake = numpy(layers.GridTokens("snake")(cells)).ravel()
    assert snake.tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    clip = np.stack([cells, cells + 9], axis=1)
    both = numpy(layers.GridTokens("snake")(clip)).ravel()
    assert both.tolist() == [*snake, *(snake + 9)]


def test_grid_tokens_have_a_static_count_if_the_grid_does(clips):
    assert layers.GridTokens().compute_output_shape((None, 3, 6, 4, 5)) == (None, 72, 5)
    assert layers.GridTokens().compute_output_shape((None, None, 4, 5)) == (None, None, 5)
    with pytest.raises(ValueError, match="scan_order must be one of.*Received"):
        layers.GridTokens("spiral")


def test_a_frame_token_is_the_mean_of_features_and_coordinates(clips):
    layer = layers.FrameTokens(7)
    outputs = numpy(layer(clips))
    kernel, bias = numpy(list(layer.projection.weights))
    top = (2 * np.arange(6) + 1) / 6 - 1
    left = (2 * np.arange(4) + 1) / 4 - 1
    coordinates = np.stack(np.broadcast_arrays(top[:, None], left[None]), axis=-1)
    inputs = np.concatenate([clips, np.broadcast_to(coordinates, (2, 3, 6, 4, 2))], axis=-1)
    projected = inputs @ kernel + bias
    close(outputs, (projected * sigmoid(projected)).mean((2, 3)), absolute=1e-5)


@pytest.fixture
def readout_inputs():
    return RANDOM.standard_normal((2, 10, 4)).astype("float32")


def pooling():
    layer = layers.SequencePooling()
    layer.build((None, None, 4))
    layer.score.kernel.assign(3 * RANDOM.standard_normal((4, 1)))
    return layer


def test_readouts_are_mean_weighted_mean_and_last(readout_inputs):
    x = readout_inputs
    close(layers.MeanReadout()(x), x.mean(1))
    close(layers.LastReadout()(x), x[:, -1])
    layer = pooling()
    weights = np.exp(x @ numpy(layer.score.kernel))
    close(layer(x), (weights * x).sum(1) / weights.sum(1), absolute=1e-5)


@pytest.mark.parametrize("make", [layers.MeanReadout, layers.LastReadout, pooling])
def test_a_stepped_readout_equals_the_complete_readout(readout_inputs, make):
    layer = make()
    step, call = jitted(layer.step), jitted(layer)
    cache, seen = layer.init_cache(2, 4), 0
    for tokens in (1, 3, 1, 5):
        outputs, cache = step(readout_inputs[:, seen : seen + tokens], cache)
        seen += tokens
        close(outputs, numpy(call(readout_inputs[:, :seen])), absolute=1e-5)


@pytest.mark.parametrize("make", [layers.MeanReadout, layers.LastReadout, pooling])
def test_readouts_ignore_padding(readout_inputs, make):
    layer, x = make(), readout_inputs.copy()
    mask = np.arange(10) < np.array([[10], [6]])
    x[1, 6:] = np.nan
    outputs = numpy(layer(x, mask=mask))
    for row, length in enumerate((10, 6)):
        close(outputs[row : row + 1], numpy(layer(readout_inputs[row : row + 1, :length])), absolute=1e-5)


def test_layers_report_the_axes_that_they_need():
    cases = {layers.GridTokens(): (8, 8, 1), layers.FrameTokens(4): (2, 4, 4, 4), layers.SequencePooling(): (2, 4)}
    for layer, shape in cases.items():
        with pytest.raises(ValueError, match=f"The input of {type(layer).__name__} must have the shape.*Received"):
            layer(np.zeros(shape, "float32"))


def test_a_mean_of_very_many_tokens_still_updates():
    layer = layers.MeanReadout()
    cache = layer.init_cache(1, 1)
    cache |= {"total": ops.full((1,), 1e8, "float32"), "largest": ops.zeros(1), "mean": ops.ones((1, 1))}
    for _ in range(100):
        outputs, cache = layer.step(np.full((1, 1, 1), 1e6, "float32"), cache)
    # Without rounding compensation, 1e8 + 1 is 1e8 in float32.
    assert float(cache["total"][0]) == pytest.approx(1e8 + 100, abs=8)
    close(outputs, [[(1e8 + 1e8) / (1e8 + 100)]], relative=1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_gated_convolution_equals_mamba_without_its_state_space(bidirectional):
    layer = layers.GatedConvLayer(6, d_conv=3, bidirectional=bidirectional)
    x = RANDOM.standard_normal((2, 7, 6)).astype("float32")
    outputs = numpy(layer(x))
    inner, gate = np.split(x @ numpy(layer.in_proj.kernel), 2, axis=-1)

    def convolved(direction, u):
        kernel, bias = numpy(direction.conv_kernel), numpy(direction.conv_bias_weight)
        padded = np.pad(u, ((0, 0), (2, 0), (0, 0)))
        y = sum(padded[:, i : i + 7] * kernel[i] for i in range(3)) + bias
        return y * sigmoid(y)

    y = convolved(layer.conv, inner)
    if bidirectional:
        y = y + convolved(layer.backward_conv, inner[:, ::-1])[:, ::-1]
    close(outputs, (y * gate * sigmoid(gate)) @ numpy(layer.out_proj.kernel), absolute=1e-5)


def test_a_gated_convolution_continues_chunks_and_isolates_documents():
    layer = layers.GatedConvLayer(6)
    layer.build((2, 9, 6))
    x = RANDOM.standard_normal((2, 9, 6)).astype("float32")
    step, call = jitted(layer.step), jitted(layer)
    cache, chunks = layer.init_cache(2), []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        outputs, cache = step(x[:, start:end], cache)
        chunks.append(numpy(outputs))
    close(np.concatenate(chunks, axis=1), numpy(call(x)), absolute=1e-5)
    packed = numpy(layer(x, segment_ids=[[0] * 4 + [1] * 5] * 2))
    close(packed[:, 4:], numpy(call(x[:, 4:])), absolute=1e-5)
    with pytest.raises(ValueError, match="bidirectional GatedConvLayer has no state.*Received"):
        layers.GatedConvLayer(6, bidirectional=True)(x, return_state=True)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.GatedConvLayer(5, d_conv=3, bidirectional=True),
        lambda: layers.SequencePooling(),
        lambda: layers.GridTokens("snake"),
        lambda: layers.FrameTokens(5),
        lambda: layers.PatchEncoder(5, 2),
        lambda: layers.ResidualEncoder(6, 2, blocks=2),
    ],
)
def test_config_and_weights_restore_a_layer(layer, clips):
    layer = layer()
    x = clips if not isinstance(layer, (layers.GatedConvLayer, layers.SequencePooling)) else clips[:, 0, 0]
    expected = numpy(layer(x))
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    again(x)
    again.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(again(x)), expected)

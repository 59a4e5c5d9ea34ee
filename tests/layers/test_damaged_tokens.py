"""NaN and infinity of one document or of padding never leave it: layers, in one call and over several steps."""

import functools

import keras
import numpy as np
import pytest
from checks import gradient_of, jitted, numpy, variable_gradients
from keras import ops

from keras_jamba import JambaBackbone
from keras_jamba.layers import (
    AttentionLayer,
    GatedConvLayer,
    JambaBlock,
    MambaLayer,
    MeanReadout,
    MoELayer,
    SequencePooling,
)

WIDTH = 8
IDS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 3, 4, 4]], "int32")
BAD = (IDS == 1) | (IDS == 4)
MASK = np.array([[0, 0, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]], bool)
LAYERS = {
    "mamba": lambda: MambaLayer(WIDTH, d_state=4),
    "bidirectional": lambda: MambaLayer(WIDTH, d_state=4, bidirectional=True),
    "gated_conv": lambda: GatedConvLayer(WIDTH),
    "attention": lambda: AttentionLayer(WIDTH, num_heads=2, num_kv_heads=1),
    "both ways": lambda: AttentionLayer(WIDTH, num_heads=2, causal=False),
    "window": lambda: AttentionLayer(WIDTH, num_heads=2, attention_window=3),
    "sinks": lambda: AttentionLayer(WIDTH, num_heads=2, attention_window=2, attention_sinks=2),
    "block": lambda: JambaBlock(MambaLayer(WIDTH, d_state=4), MoELayer(WIDTH, num_experts=4, d_ff=8)),
    "backbone": lambda: JambaBackbone(WIDTH, num_layers=2, mamba_ratio=1, num_heads=2, d_ff=8, num_experts=4),
}


def layer_of(name):
    keras.utils.set_random_seed(0)
    layer = LAYERS[name]()
    layer.build((None, None, WIDTH))
    return layer


def features(bad=None, value=np.nan):
    x = np.random.default_rng(0).standard_normal((2, IDS.shape[1], WIDTH)).astype("float32")
    return x if bad is None else np.where(bad[..., None], np.float32(value), x)


def with_losses(function):
    """Returns the outputs of `function()` and the sum of the losses that layers added, and keeps no update."""
    with keras.StatelessScope(collect_losses=True) as scope:
        y = function()
    return y, sum((ops.cast(loss, "float32") for loss in scope.losses), ops.zeros(()))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_damaged_document_changes_no_other_document(name):
    layer = layer_of(name)

    def loss(x, weights):
        y, _ = with_losses(lambda: layer(x, segment_ids=ops.convert_to_tensor(IDS)))
        return ops.sum(y * weights)

    call, gradient = jitted(lambda x: layer(x, segment_ids=ops.convert_to_tensor(IDS))), gradient_of(loss)
    weights = np.random.default_rng(1).standard_normal((*IDS.shape, WIDTH)).astype("float32")
    y, grad = numpy(call(features())), gradient([features(), weights])[0]
    for value in (np.nan, np.inf):
        found = numpy(call(features(BAD, value)))
        assert not np.isfinite(found[BAD]).all(axis=-1).any()
        close(found[~BAD], y[~BAD])
        damaged = np.where(BAD[..., None], np.float32(np.nan), weights)
        found = gradient([features(BAD, value), damaged])[0]
        assert np.isfinite(found[~BAD]).all()
        close(found[~BAD], grad[~BAD])


@pytest.mark.parametrize("name", LAYERS)
def test_damaged_padding_changes_no_output_and_no_gradient(name):
    layer = layer_of(name)
    mask = {"padding_mask" if name == "backbone" else "mask": ops.convert_to_tensor(MASK)}

    def loss(x):
        y, more = with_losses(lambda: layer(ops.convert_to_tensor(x), **mask))
        return ops.sum(ops.where(ops.convert_to_tensor(MASK)[..., None], y * y, 0.0)) + more

    variables = layer.trainable_variables
    y, grads = numpy(layer(features(), **mask)), variable_gradients(lambda: loss(features()), variables)
    damaged = features(~MASK)
    close(numpy(layer(damaged, **mask))[MASK], y[MASK])
    for found, expected in zip(variable_gradients(lambda: loss(damaged), variables), grads, strict=True):
        close(found, expected)
    gradient = gradient_of(loss)
    close(gradient([damaged])[0], gradient([features()])[0])


@pytest.mark.parametrize("name", LAYERS)
def test_a_damaged_gradient_at_padding_reaches_no_real_token(name):
    layer = layer_of(name)
    mask = {"padding_mask" if name == "backbone" else "mask": ops.convert_to_tensor(MASK)}
    weights = np.random.default_rng(1).standard_normal((*IDS.shape, WIDTH)).astype("float32")
    gradient = gradient_of(lambda x, weights: ops.sum(layer(ops.convert_to_tensor(x), **mask) * weights))
    damaged = np.where(MASK[..., None], weights, np.float32(np.nan))
    found, expected = gradient([features(), damaged])[0], gradient([features(), weights])[0]
    close(found[MASK], expected[MASK])


@pytest.mark.parametrize("name", ["mamba", "gated_conv", "attention", "window", "block", "backbone"])
def test_a_step_after_a_damaged_document_equals_one_after_an_intact_document(name):
    layer = layer_of(name)
    step = jitted(layer.step)
    outputs = []
    for x in (features(), features(BAD & (IDS == 1))):
        cache = layer.init_cache(2, max_length=9)
        _, cache = step(x[:, :7], cache, segment_ids=IDS[:, :7])
        # A new document, and then one more of its tokens, without ids.
        first, cache = step(x[:, 7:8], cache, segment_ids=IDS[:, 7:8])
        second, _ = step(x[:, 8:], cache)
        outputs.append(numpy([first, second]))
    close(outputs[1][0], outputs[0][0])
    close(outputs[1][1], outputs[0][1])


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_the_losses_of_experts_see_a_damaged_token_as_one_with_equal_logits(capacity_factor):
    keras.utils.set_random_seed(0)
    given = dict(num_experts=4, d_ff=8, z_coefficient=0.1, balance_coefficient=0.1)
    layer = MoELayer(WIDTH, **given, capacity_factor=capacity_factor)
    layer.build((None, None, WIDTH))
    gradient = gradient_of(lambda x: with_losses(lambda: layer(x))[1])
    bad = np.zeros_like(BAD)
    bad[0, 3] = bad[1, 8] = True
    # The router has no bias, so that zeros have equal logits.
    found, expected = gradient([features(bad)])[0], gradient([features(bad, 0.0)])[0]
    assert np.abs(expected[~bad]).max() > 1e-4
    close(found[~bad], expected[~bad])
    layer(features(bad))
    loss = numpy(layer.aux_loss)
    layer(features(bad, 0.0))
    close(loss, numpy(layer.aux_loss))
    assert np.isfinite(numpy(layer.usage)).all()


@pytest.mark.parametrize("readout", [MeanReadout, SequencePooling])
def test_damaged_padding_changes_no_readout_and_no_gradient(readout):
    layer = readout()
    layer.build((None, None, WIDTH))
    variables = layer.trainable_variables
    results = []
    for x in (features(), features(~MASK)):
        call = functools.partial(layer, ops.convert_to_tensor(x), mask=ops.convert_to_tensor(MASK))
        loss = lambda call=call: ops.sum(call() ** 2)  # noqa: E731
        results.append([numpy(call()), *(variable_gradients(loss, variables) if variables else [])])
    for found, expected in zip(*results, strict=True):
        close(found, expected)

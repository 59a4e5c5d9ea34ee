"""MambaLayer as a sequence layer: states, chunks, padding, documents and two directions."""

import keras
import numpy as np
import pytest
from checks import gradients, jitted, numpy
from keras import ops

from keras_jamba.layers import FeedForward, GatedConvLayer, JambaBlock, MambaLayer, detach_state

LENGTH = 9


@pytest.fixture(scope="module")
def layer():
    keras.utils.set_random_seed(0)
    layer = MambaLayer(8, d_state=4, mixer_rms_norm=True, proj_bias=True)
    layer.build((None, None, 8))
    # Non-zero biases: unmasked padding would enter the convolution of real tokens.
    layer.in_proj.bias.assign(np.linspace(-1, 1, 32))
    return layer


@pytest.fixture(scope="module")
def step(layer):
    return jitted(layer.step)


@pytest.fixture(scope="module")
def with_state(layer):
    return jitted(lambda x, **given: layer(x, return_state=True, **given))


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((3, LENGTH, 8)).astype("float32")


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (4, 5, 8), tuple(range(1, LENGTH))])
def test_chunks_match_the_complete_sequence(layer, step, with_state, features, cuts):
    outputs, last = with_state(features)
    cache, chunks = layer.init_cache(3), []
    for a, b in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        y, cache = step(features[:, a:b], cache)
        chunks.append(numpy(y))
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), numpy(outputs), atol=2e-5)
    for name in ("conv", "ssm"):
        np.testing.assert_allclose(numpy(cache[name]), numpy(last[name]), atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_changes_outputs_or_states(with_state, features, side):
    lengths = [4, 1, LENGTH]
    mask = np.array([np.arange(LENGTH) < n for n in lengths])
    mask = mask[:, ::-1].copy() if side == "left" else mask
    outputs, state = with_state(features, mask=mask)
    for row, real in enumerate(mask):
        alone, last = with_state(features[row : row + 1, real])
        np.testing.assert_allclose(numpy(outputs)[row, real], numpy(alone)[0], atol=2e-5)
        for name in ("conv", "ssm"):
            np.testing.assert_allclose(numpy(state[name])[row], numpy(last[name])[0], atol=2e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_documents_match_separate_documents(features, bidirectional):
    layer = MambaLayer(8, d_state=4, bidirectional=bidirectional)
    ids = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2]] * 3)
    layer.build(features.shape)
    call = jitted(layer)
    packed = numpy(call(features, segment_ids=ids))
    for i in range(3):
        alone = call(features[:, ids[0] == i])
        np.testing.assert_allclose(packed[:, ids[0] == i], numpy(alone), atol=2e-5)


def test_a_new_document_discards_the_state(layer, with_state, features):
    call = jitted(layer)
    _, state = with_state(features[:, :4], segment_ids=np.array([[0, 0, 1, 1]] * 3))
    np.testing.assert_array_equal(numpy(state["document"]), [1, 1, 1])
    # Row 0 continues, row 1 starts a document, row 2 has padding before a new document.
    ids, mask = np.array([[1] * 5, [2] * 5, [1, 1, 2, 2, 2]]), np.array([[True] * 5] * 2 + [[False] * 2 + [True] * 3])
    outputs, last = with_state(features[:, 4:], mask=mask, segment_ids=ids, initial_state=state)
    np.testing.assert_allclose(numpy(outputs)[0], numpy(call(features[:1, 2:]))[0, 2:], atol=2e-5)
    np.testing.assert_allclose(numpy(outputs)[1], numpy(call(features[1:2, 4:]))[0], atol=2e-5)
    np.testing.assert_allclose(numpy(outputs)[2, 2:], numpy(call(features[2:, 6:]))[0], atol=2e-5)
    np.testing.assert_array_equal(numpy(last["document"]), [1, 2, 2])
    # Tokens without segment ids continue the document of the state.
    _, held = with_state(features[:, 4:], initial_state=state)
    np.testing.assert_array_equal(numpy(held["document"]), [1, 1, 1])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_segment_ids_may_be_lists_and_any_change_starts_a_document(features, bidirectional):
    layer = MambaLayer(8, d_state=4, bidirectional=bidirectional)
    mask, ids = [[True] * 6 + [False] * 3] * 3, np.array([[3] * 5 + [1] * 4] * 3, "uint8")
    expected = numpy(layer(features, mask=np.array(mask), segment_ids=np.array([[0] * 5 + [1] * 4] * 3)))
    np.testing.assert_allclose(numpy(layer(features, mask=mask, segment_ids=ids.tolist())), expected, atol=1e-6)
    np.testing.assert_allclose(numpy(layer(features, mask=mask, segment_ids=ids)), expected, atol=1e-6)


def test_the_layer_receives_keras_masks(features):
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, MambaLayer(8, d_state=4)(keras.layers.Masking()(inputs)))
    padded = features.copy()
    padded[0, :3] = 0
    np.testing.assert_allclose(numpy(model(padded))[0, 3:], numpy(model(features[:1, 3:]))[0], atol=2e-5, rtol=1e-4)


def test_a_bidirectional_layer_sums_its_forward_and_backward_scans(features):
    layer = MambaLayer(8, d_state=4, bidirectional=True)
    outputs = numpy(layer(features))
    x, z = ops.split(layer.in_proj(features), 2, axis=-1)
    forward = layer.ssm(x, z)
    backward = layer.backward_ssm(ops.flip(x, 1), ops.flip(z, 1))
    np.testing.assert_allclose(outputs, numpy(layer.out_proj(forward + ops.flip(backward, 1))), atol=2e-5)
    changed = features.copy()
    changed[:, 4] += 1
    assert (np.abs(numpy(layer(changed)) - outputs).max(axis=(0, 2)) > 0).all()


def test_gradients_through_states_equal_those_of_one_call(layer, features):
    def one_call(x):
        return ops.sum(layer(x) ** 2)

    def two_calls(x, detach):
        y, state = layer(x[:, :5], return_state=True)
        state = detach_state(state) if detach else state
        return ops.sum(y**2) + ops.sum(layer(x[:, 5:], initial_state=state) ** 2)

    (expected,) = gradients(one_call, [features])
    (through,) = gradients(lambda x: two_calls(x, False), [features])
    (truncated,) = gradients(lambda x: two_calls(x, True), [features])
    np.testing.assert_allclose(through, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(truncated[:, 5:], expected[:, 5:], rtol=1e-3, atol=1e-4)
    assert np.abs(truncated[:, :5] - expected[:, :5]).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["ssm"], "must be a dict with"),
        (lambda s: s | {"conv": s["conv"][:2]}, r"initial_state\['conv'\].*Received: shape=\(2, 3, 16\)"),
        (lambda s: s | {"ssm": ops.cast(s["ssm"], "float16")}, r"initial_state\['ssm'\].*float32.*dtype=float16"),
        (lambda s: s | {"key": s["ssm"]}, "must be a dict with"),
    ],
)
def test_an_invalid_state_is_reported(layer, features, change, message):
    with pytest.raises(ValueError, match=message):
        layer(features, initial_state=change(layer.init_cache(3)))


def test_a_bidirectional_layer_refuses_states(features):
    layer = MambaLayer(8, bidirectional=True)
    for call in (lambda: layer(features, return_state=True), lambda: layer.init_cache(3)):
        with pytest.raises(ValueError, match="bidirectional.*Received: bidirectional=True"):
            call()


def test_the_state_stays_float32_under_mixed_precision(features):
    layer = MambaLayer(8, d_state=4, dtype="mixed_bfloat16")
    _, first = layer(features[:, :5], return_state=True)
    _, state = layer(features[:, 5:], initial_state=first, return_state=True)
    assert {k: keras.backend.standardize_dtype(v.dtype) for k, v in state.items()} == {
        "conv": "bfloat16",
        "ssm": "float32",
        "document": "int32",
    }
    assert np.abs(numpy(first["ssm"]) - numpy(ops.cast(ops.cast(first["ssm"], "bfloat16"), "float32"))).max() > 0


@pytest.mark.parametrize("kind", [MambaLayer, GatedConvLayer])
def test_an_unrequested_state_is_not_computed(kind, features, monkeypatch):
    layer = kind(8)
    ids = np.array([[0] * 4 + [1] * 5] * 3)
    expected = [numpy(layer(features, segment_ids=ids, return_state=True)[0]), numpy(layer(features))]

    def unwanted(*args):
        raise AssertionError("The layer computed an unrequested state.")

    monkeypatch.setattr("keras_jamba.ops.convolution.last_inputs", unwanted)
    monkeypatch.setattr("keras_jamba.layers.states.SequenceState.final", unwanted)
    np.testing.assert_allclose(numpy(layer(features, segment_ids=ids)), expected[0], atol=1e-6)
    monkeypatch.setattr("keras_jamba.layers.states._no_document", unwanted)
    np.testing.assert_allclose(numpy(layer(features)), expected[1], atol=1e-6)


def test_a_block_inspects_its_sublayers_once(features, monkeypatch):
    block = JambaBlock(MambaLayer(8, d_state=4), FeedForward(8))
    expected = numpy(block(features))
    monkeypatch.setattr("keras_jamba.layers.block.inspect", None)
    np.testing.assert_array_equal(numpy(block(features)), expected)

"""AttentionLayer as a sequence layer: caches, chunks, padding, documents and windows."""

import keras
import numpy as np
import pytest
from checks import full, jitted, numpy, variable_gradients
from keras import ops

from keras_jamba.layers import AttentionLayer

LENGTH = 9


@pytest.fixture(scope="module", params=[(None, 0), (4, 0), (3, 2)], ids=["complete", "window", "sinks"])
def layer(request):
    keras.utils.set_random_seed(0)
    window, sinks = request.param
    layer = AttentionLayer(8, num_heads=4, num_kv_heads=2, attention_window=window, attention_sinks=sinks)
    layer.build((3, LENGTH, 8))
    return layer


@pytest.fixture(scope="module")
def step(layer):
    return jitted(layer.step)


@pytest.fixture(scope="module")
def with_state(layer):
    return jitted(lambda x, state=None: layer(x, initial_state=state, return_state=True))


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((3, LENGTH, 8)).astype("float32")


def slots_of(layer):
    """Returns the slots of a cache that serves sequences of any length, or None."""
    return layer.attention_window and layer.attention_window + layer.attention_sinks


def spans(cuts):
    return list(zip((0, *cuts), (*cuts, LENGTH), strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 4, 20])
def test_windowed_attention_equals_banded_attention(features, window, causal):
    layer = AttentionLayer(8, num_heads=2, attention_window=window, causal=causal, use_rope=False)
    layer.build(features.shape)
    mask = np.ones((3, LENGTH), bool)
    mask[0, [0, 4, 8]] = mask[1, 2:4] = False
    ids = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 3)
    outputs = numpy(jitted(layer)(features, mask=mask, segment_ids=ids))
    q, k, v = (numpy(f(features)).reshape(3, LENGTH, 2, 4) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    scores = np.einsum("bthc,bshc->bhts", q, k) / 2
    position = np.cumsum(mask, axis=1)
    distance = position[:, :, None] - position[:, None, :]
    visible = (np.abs(distance) < window) & mask[:, None, :] & (ids[:, :, None] == ids[:, None, :])
    visible &= (distance >= 0) | (not causal)
    scores = np.where(visible[:, None], scores, -1e9)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshc->bthc", p, v).reshape(3, LENGTH, 8)
    np.testing.assert_allclose(outputs[mask], numpy(layer.out_proj(mixed))[mask], atol=2e-5)


def test_gradients_through_a_window_equal_those_of_short_chunks(features):
    def loss(layer):
        return lambda: ops.sum(layer(features, segment_ids=np.zeros((3, LENGTH), "int32")) ** 2)

    # The layer computes chunks shorter than the window without blocks.
    layer = AttentionLayer(8, num_heads=2, attention_window=4)
    layer.build(features.shape)
    ours = variable_gradients(loss(layer), layer.trainable_variables)
    chunked = lambda: sum(ops.sum(y**2) for y in chunk_outputs(layer, features))  # noqa: E731
    for a, b in zip(ours, variable_gradients(chunked, layer.trainable_variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def chunk_outputs(layer, features):
    state = None
    for i in range(0, LENGTH, 3):
        y, state = layer(features[:, i : i + 3], initial_state=state, return_state=True)
        yield y


CUTS = [(1,), (2, 3), (6, 7, 8)]


# A growing state changes shape, so JAX compiles every chunk separately.
@pytest.mark.parametrize(
    "cuts, fixed", [*((c, fixed) for c in CUTS for fixed in (True, False)), (tuple(range(1, LENGTH)), True)]
)
def test_chunks_match_the_complete_sequence(layer, step, with_state, features, cuts, fixed):
    outputs = numpy(layer(features))
    state, chunks = layer.init_cache(3, max_length=12) if fixed else None, []
    for a, b in spans(cuts):
        if fixed:
            y, state = step(features[:, a:b], state)
        else:
            y, state = with_state(features[:, a:b], state)
        chunks.append(numpy(y))
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), outputs, atol=2e-5)
    np.testing.assert_array_equal(numpy(state["length"]), [LENGTH] * 3)
    assert state["key"].shape[1] == min(12 if fixed else LENGTH, slots_of(layer) or 99)


@full("jax", "tensorflow")
@pytest.mark.parametrize("cuts", [(), (2, 5), (3, 4, 8)])
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_padding_never_changes_outputs_or_states(layer, step, with_state, features, side, cuts):
    mask = np.array([np.arange(LENGTH) < n for n in (4, 1, LENGTH)])
    if side == "left":
        mask = mask[:, ::-1].copy()
    elif side == "anywhere":
        mask = np.random.default_rng(1).random((3, LENGTH)) > 0.4
    cache, chunks = layer.init_cache(3, max_length=LENGTH), []
    for a, b in spans(cuts):
        y, cache = step(features[:, a:b], cache, mask=mask[:, a:b])
        chunks.append(numpy(y))
    outputs = np.concatenate(chunks, axis=1)
    assert np.isfinite(outputs).all()
    for row, real in enumerate(mask):
        alone, last = with_state(features[row : row + 1, real])
        np.testing.assert_allclose(outputs[row, real], numpy(alone)[0], atol=2e-5)
        stored = min(real.sum(), cache["key"].shape[1])
        newest = [(real.sum() - 1 - i) for i in range(stored)]
        for name in ("key", "value"):
            ours = numpy(cache[name])[row][[p % cache[name].shape[1] for p in newest]]
            theirs = numpy(last[name])[0][[p % last[name].shape[1] for p in newest]]
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_match_separate_documents(features, causal):
    layer = AttentionLayer(8, num_heads=2, causal=causal)
    layer.build(features.shape)
    ids = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2]] * 3)
    call = jitted(layer)
    packed = numpy(call(features, segment_ids=ids))
    for i in range(3):
        alone = call(features[:, ids[0] == i])
        np.testing.assert_allclose(packed[:, ids[0] == i], numpy(alone), atol=2e-5)


def test_a_cache_continues_its_last_document(layer, step, features):
    ids = np.array([[0, 0, 1, 1, 1]] * 3)
    _, cache = step(features[:, :5], layer.init_cache(3, LENGTH), segment_ids=ids)
    np.testing.assert_array_equal(numpy(cache["start"]), [2, 2, 2])
    more = np.array([[1, 1, 2, 2]] * 3)
    outputs, cache = step(features[:, 5:], cache, segment_ids=more)
    np.testing.assert_allclose(numpy(outputs)[:, :2], numpy(jitted(layer)(features[:, 2:7]))[:, 3:], atol=2e-5)
    np.testing.assert_allclose(numpy(outputs)[:, 2:], numpy(jitted(layer)(features[:, 7:])), atol=2e-5)
    np.testing.assert_array_equal(numpy(cache["start"]), [7, 7, 7])


def test_attention_is_independent_of_the_start_position(features):
    layer = AttentionLayer(8, num_heads=2)
    cache = layer.init_cache(3, 16) | {"length": ops.full((3,), 1000, "int32"), "start": ops.full((3,), 1000, "int32")}
    cache = cache | {name: ops.concatenate([cache[name]] * 70, axis=1) for name in ("key", "value")}
    late, _ = layer.step(features, cache)
    np.testing.assert_allclose(numpy(late), numpy(layer(features)), atol=1e-4)


@pytest.mark.parametrize("start", [0, 100_000, 2**31 - 100])
def test_a_windowed_cache_never_fills_up(features, start):
    layer = AttentionLayer(8, num_heads=2, attention_window=4)
    layer.build(features.shape)
    start = ops.full((3,), start, "int32")
    cache = layer.init_cache(3) | {"length": start, "start": start}
    step = jitted(layer.step)
    for i in range(3 * LENGTH):
        y, cache = step(features[:, i % LENGTH][:, None], cache)
    assert cache["key"].shape == (3, 4, 2, 4)
    np.testing.assert_allclose(numpy(y)[:, 0], numpy(jitted(layer)(features[:, -4:]))[:, -1], atol=1e-4)


def test_a_short_first_chunk_allocates_a_complete_window(features):
    layer = AttentionLayer(8, num_heads=2, attention_window=6)
    layer.build(features.shape)
    first, state = jitted(lambda x: layer(x, return_state=True))(features[:, :2])
    rest, _ = jitted(layer.step)(features[:, 2:], state)
    outputs = np.concatenate([numpy(first), numpy(rest)], axis=1)
    np.testing.assert_allclose(outputs, numpy(jitted(layer)(features)), atol=2e-5)
    with pytest.raises(ValueError, match="or a complete window. Received: a capacity of 3 tokens, 9 needed"):
        layer.step(features, layer.init_cache(3, max_length=3))


def test_nonfinite_padding_never_reaches_outputs_or_gradients(layer, features):
    mask = np.arange(LENGTH) >= np.array([[4], [0], [2]])
    spoiled = np.where(mask[..., None], features, np.nan).astype("float32")
    outputs, state = layer(spoiled, mask=mask, return_state=True)
    np.testing.assert_allclose(numpy(outputs)[mask], numpy(layer(features, mask=mask))[mask], atol=2e-5)
    assert all(np.isfinite(numpy(x)).all() for x in state.values())
    loss = lambda: ops.sum(layer(spoiled, mask=mask)[1])  # noqa: E731
    assert all(np.isfinite(gradient).all() for gradient in variable_gradients(loss, layer.trainable_variables))


def test_a_full_cache_is_an_error(features):
    layer = AttentionLayer(8, num_heads=2)
    with pytest.raises(ValueError, match="a capacity of 4 tokens, 9 needed"):
        layer.step(features, layer.init_cache(3, 4))
    mask = np.arange(LENGTH) < np.array([[4], [2], [4]])
    layer.step(features, layer.init_cache(3, 4), mask=mask)  # padding needs no capacity
    with pytest.raises(ValueError, match="a capacity of 3 tokens, 4 needed"):
        layer.step(features, layer.init_cache(3, 3), mask=mask)
    with pytest.raises(ValueError, match="needs max_length.*Received"):
        layer.init_cache(3)
    with pytest.raises(ValueError, match=r"initial_state\['key'\].*Received: shape=\(2, 4, 2, 4\)"):
        layer(features, initial_state=layer.init_cache(2, 4))
    with pytest.raises(ValueError, match="cache must be a dict with.*Received: NoneType"):
        layer.step(features, None)
    with pytest.raises(ValueError, match="max_length must be an integer.*Received: max_length=2.5"):
        layer.init_cache(3, 2.5)
    noncausal = AttentionLayer(8, num_heads=2, causal=False)
    for call in (lambda: noncausal.init_cache(3, 4), lambda: noncausal(features, return_state=True)):
        with pytest.raises(ValueError, match="not causal.*Received: causal=False"):
            call()


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_row_of_only_padding_has_finite_outputs_and_gradients(features, policy):
    layer = AttentionLayer(8, num_heads=2, attention_window=3, dtype=policy)
    layer.build(features.shape)
    mask = np.ones((3, LENGTH), bool)
    mask[1] = False
    mask[2, :4] = False
    x = ops.cast(features, layer.compute_dtype)
    assert np.isfinite(numpy(ops.cast(layer(x, mask=mask), "float32"))).all()
    loss = lambda: ops.sum(ops.square(ops.cast(layer(x, mask=mask), "float32")[0]))  # noqa: E731
    for gradient in variable_gradients(loss, layer.trainable_variables):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_the_layer_receives_keras_masks(features):
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, AttentionLayer(8, num_heads=2)(keras.layers.Masking()(inputs)))
    padded = features.copy()
    padded[0, :3] = 0
    np.testing.assert_allclose(numpy(model(padded))[0, 3:], numpy(model(features[:1, 3:]))[0], atol=2e-5)


@full()
def test_a_long_stream_with_sinks_equals_the_full_pass_in_constant_memory():
    tokens, chunk = 100_000, 500
    layer = AttentionLayer(8, num_heads=2, num_kv_heads=1, attention_window=200, attention_sinks=4)
    layer.build((1, None, 8))
    x = np.random.default_rng(0).standard_normal((1, tokens, 8)).astype("float32")
    expected, step = numpy(jitted(layer)(x)), jitted(layer.step)
    cache = layer.init_cache(1)
    assert cache["key"].shape[1] == 204
    for start in range(0, tokens, chunk):
        y, cache = step(x[:, start : start + chunk], cache)
        np.testing.assert_allclose(numpy(y), expected[:, start : start + chunk], atol=1e-4)


def test_a_cache_exceeds_the_sinks_which_need_a_window():
    layer = AttentionLayer(8, num_heads=2, attention_window=3, attention_sinks=4)
    assert layer.init_cache(1, max_length=1)["key"].shape[1] == 5
    with pytest.raises(ValueError, match="attention_sinks need a window.*Received: attention_sinks=4"):
        AttentionLayer(8, num_heads=2, attention_sinks=4)

"""The backbone as a sequence model: chunking, padding and packing never change a document's outputs."""

import hypothesis
import keras
import numpy as np
import pytest
from checks import draws, full, jitted, numpy
from hypothesis import strategies as st
from keras import ops

import keras_jamba

BATCH, LENGTH, WIDTH = 2, 12, 16


@pytest.fixture(scope="module", params=[(None, 0), (5, 0), (3, 2)], ids=["complete", "window", "sinks"])
def backbone(request):
    keras.utils.set_random_seed(3)
    return keras_jamba.JambaBackbone(
        d_model=WIDTH,
        num_layers=3,
        mamba_ratio=2,
        num_heads=4,
        num_kv_heads=2,
        num_experts=4,
        d_ff=24,
        d_state=4,
        attention_window=request.param[0],
        attention_sinks=request.param[1],
    )


@pytest.fixture(scope="module")
def call(backbone):
    return jitted(backbone)


@pytest.fixture(scope="module")
def step(backbone):
    return jitted(backbone.step)


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((BATCH, LENGTH, WIDTH)).astype("float32")


@full("jax", "tensorflow")
@draws(30)
@hypothesis.given(
    cuts=st.sets(st.sampled_from([4, 8])),
    mask=st.none() | st.lists(st.booleans(), min_size=BATCH * LENGTH, max_size=BATCH * LENGTH),
    begins=st.none() | st.sets(st.sampled_from([2, 4, 7, 8]), max_size=2),
    seed=st.integers(0, 99),
)
def test_chunks_and_padding_never_change_a_document(backbone, step, cuts, mask, begins, seed):
    features = np.random.default_rng(seed).standard_normal((BATCH, LENGTH, WIDTH)).astype("float32")
    mask = np.ones((BATCH, LENGTH), bool) if mask is None else np.array(mask).reshape(BATCH, LENGTH)
    ids = np.stack([np.isin(np.arange(LENGTH), list(begins or ())).cumsum()] * BATCH)
    cache, chunks = backbone.init_cache(BATCH, max_length=LENGTH), []
    for a, b in zip((0, *sorted(cuts)), (*sorted(cuts), LENGTH), strict=True):
        documents = None if begins is None else ids[:, a:b]
        y, cache = step(features[:, a:b], cache, padding_mask=mask[:, a:b], segment_ids=documents)
        chunks.append(numpy(y))
    outputs = np.concatenate(chunks, axis=1)
    for document in np.unique(ids):
        here = mask & (ids == document)
        # The document moves to the front, for one compiled length. Causality hides the tokens after it.
        order = np.argsort(~here, axis=1, kind="stable")
        alone = backbone.predict_on_batch(np.take_along_axis(features, order[..., None], axis=1))
        for row, count in enumerate(here.sum(axis=1)):
            np.testing.assert_allclose(outputs[row, here[row]], alone[row, :count], atol=1e-4)


@full("jax")
def test_calls_with_states_match_the_complete_sequence(backbone, features):
    expected = numpy(backbone(features))
    call = jitted(lambda x, state=None: backbone(x, initial_state=state, return_state=True))
    first, state = call(features[:, :7])
    second, _ = call(features[:, 7:], state)
    np.testing.assert_allclose(np.concatenate([numpy(first), numpy(second)], axis=1), expected, atol=1e-4)


@full("jax")
def test_every_call_can_return_the_routing_of_every_layer(backbone, features):
    mask = np.arange(LENGTH) < np.array([[LENGTH], [4]])
    expected, state = backbone(features, padding_mask=mask, return_state=True)
    outputs, again, routing = backbone(features, padding_mask=mask, return_state=True, return_routing=True)
    np.testing.assert_allclose(numpy(outputs), numpy(expected), atol=1e-6)
    assert again.keys() == state.keys() and sorted(routing) == ["block_1"]
    routing = numpy(backbone(features, padding_mask=mask, return_routing=True)[1])["block_1"]
    assert routing["logits"].shape == (BATCH, LENGTH, 4)
    share = np.bincount(routing["indices"][mask].reshape(-1), minlength=4) / (2 * mask.sum())
    np.testing.assert_allclose(routing["expert_share"], share, rtol=1e-5)
    with pytest.raises(ValueError, match="Only a block with experts routes tokens. Received: return_routing=True"):
        backbone.blocks[0](features, return_routing=True)


def test_a_functional_model_can_return_a_state(backbone, features):
    inputs = keras.Input((None, WIDTH))
    outputs, state, routing = backbone(inputs, return_state=True, return_routing=True)
    model = keras.Model(inputs, [outputs, state, routing])
    expected = backbone(features, return_state=True, return_routing=True)
    for ours, theirs in zip(*map(keras.tree.flatten, (model(features), expected)), strict=True):
        np.testing.assert_allclose(numpy(ours), numpy(theirs), atol=1e-5)


def test_a_clone_is_a_backbone(backbone, features):
    clone = keras.models.clone_model(backbone)
    clone.set_weights(backbone.get_weights())
    mask = np.arange(LENGTH) < np.array([[LENGTH], [4]])
    expected = numpy(backbone(features, padding_mask=mask))
    np.testing.assert_allclose(numpy(clone(features, padding_mask=mask))[mask], expected[mask], atol=1e-5)


def compiled(function):
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


@full("jax")
def test_a_step_can_be_compiled_by_itself(backbone, features):
    step = compiled(lambda x, cache: backbone.step(x, cache))
    expected, experts = numpy(backbone(features)), backbone.blocks[1].feed_forward
    before = numpy([experts.usage.value, experts.aux_loss.value])
    cache, chunks = backbone.init_cache(BATCH, LENGTH), []
    for i in range(3):
        y, cache = step(ops.convert_to_tensor(features[:, i : i + 1]), cache)
        chunks.append(numpy(y))
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), expected[:, :3], atol=1e-4)
    # A compiled step assigns no variable and leaks no tracer.
    for a, b in zip(numpy([experts.usage.value, experts.aux_loss.value]), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(numpy(loss)) for loss in backbone.losses)


def test_packed_documents_match_separate_documents(call, features):
    ids = np.array([[0] * 3 + [1] * 5 + [2] * 4] * BATCH)
    packed = numpy(call(features, segment_ids=ids))
    for i in range(3):
        alone = call(features[:, ids[0] == i])
        np.testing.assert_allclose(packed[:, ids[0] == i], numpy(alone), atol=1e-4)


def test_rollback_equals_stepping_with_only_the_kept_tokens(backbone, features):
    counts = np.array([2, 5], "int32")
    mask = np.ones((BATCH, 6), bool)
    mask[1, 1:3] = False

    def both(x, count):
        _, cache = backbone.step(x[:, :6], backbone.init_cache(BATCH, LENGTH))
        _, _, rollback_state = backbone.step(x[:, 6:], cache, padding_mask=mask, return_rollback_state=True)
        alone = []
        for row, kept in enumerate(counts):
            here = keras.tree.map_structure(lambda leaf, row=row: leaf[row : row + 1], cache)
            given = x[row : row + 1, 6 : 6 + kept], here
            alone.append(backbone.step(*given, padding_mask=mask[row : row + 1, :kept])[1])
        return backbone.rollback(rollback_state, count), alone

    found, alone = numpy(jitted(both)(ops.convert_to_tensor(features), ops.convert_to_tensor(counts)))
    assert found.keys() == backbone.init_cache(BATCH, LENGTH).keys()
    for name, block in found.items():
        for leaf, x in block.items():
            for row in range(BATCH):
                np.testing.assert_allclose(
                    x[row], alone[row][name][leaf][0], rtol=0, atol=2e-6, err_msg=f"{name}/{leaf}"
                )
    with pytest.raises(
        ValueError, match="The rollback_state of this backbone must be a dict with .*Received: .*'block_0'"
    ):
        backbone.rollback({"block_0": {}}, counts)


def test_a_cache_can_be_saved_reordered_and_reused(backbone, step, features, tmp_path):
    _, cache = step(features[:, :6], backbone.init_cache(BATCH, LENGTH))
    leaves = {f"{b}/{n}": numpy(x) for b, block in cache.items() for n, x in block.items()}
    np.savez(tmp_path / "cache.npz", **leaves)
    stored = np.load(tmp_path / "cache.npz")
    loaded = {b: {n: stored[f"{b}/{n}"] for n in block} for b, block in cache.items()}
    expected, _ = step(features[:, 6:], cache)
    again, _ = step(features[:, 6:], loaded)
    np.testing.assert_allclose(numpy(again), numpy(expected), atol=1e-6)
    order = np.array([1, 0], "int32")
    swapped = keras.tree.map_structure(lambda x: ops.take(x, order, axis=0), cache)
    reordered, _ = step(features[order, 6:], swapped)
    np.testing.assert_allclose(numpy(reordered), numpy(expected)[order], atol=1e-5)


@full("jax")
def test_the_backbone_receives_keras_masks_of_an_embedding(backbone, call):
    ids = np.array([[0, 0, 0, 4, 5, 6, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]])
    tokens = keras.Input((None,), dtype="int32")
    embedding = keras.layers.Embedding(7, WIDTH, mask_zero=True)
    model = keras.Model(tokens, backbone(embedding(tokens)))
    expected = backbone(embedding(ids), padding_mask=ids != 0)
    np.testing.assert_allclose(numpy(model(ids))[ids != 0], numpy(expected)[ids != 0], atol=1e-5)
    stepped, _ = backbone.step(embedding(ids), backbone.init_cache(2, LENGTH))
    np.testing.assert_allclose(numpy(stepped)[ids != 0], numpy(expected)[ids != 0], atol=1e-4)
    # Keras fills in no mask if the call has a second tensor argument.
    zeros = np.zeros_like(ids)
    np.testing.assert_allclose(
        numpy(backbone(embedding(ids), segment_ids=zeros))[ids != 0], numpy(expected)[ids != 0], atol=1e-4
    )
    documents = keras.Input((None,), dtype="int32")
    model = keras.Model([tokens, documents], backbone(embedding(tokens), segment_ids=documents))
    np.testing.assert_allclose(model.predict([ids, zeros], verbose=0)[ids != 0], numpy(expected)[ids != 0], atol=1e-4)
    alone = call(embedding(ids[:1, 3:]))
    np.testing.assert_allclose(numpy(model([ids, zeros]))[0, 3:], numpy(alone)[0], atol=1e-4)


def test_states_keep_their_dtypes_under_mixed_precision(features):
    model = keras_jamba.JambaBackbone(
        d_model=WIDTH, num_layers=2, mamba_ratio=1, moe_frequency=0, num_heads=2, d_state=4, dtype="mixed_bfloat16"
    )
    expected, step = numpy(ops.cast(jitted(model)(features), "float32")), jitted(model.step)
    _, cache = step(features[:, :5], model.init_cache(BATCH, LENGTH))
    dtypes = {n: keras.backend.standardize_dtype(x.dtype) for block in cache.values() for n, x in block.items()}
    assert dtypes["ssm"] == "float32" and dtypes["key"] == "bfloat16" and dtypes["length"] == "int32"
    outputs, _ = step(features[:, 5:], cache)
    np.testing.assert_allclose(numpy(ops.cast(outputs, "float32")), expected[:, 5:], atol=0.1)


def test_a_state_of_another_model_or_batch_is_reported(backbone, features):
    with pytest.raises(ValueError, match="must be a dict with.*Received"):
        backbone.step(features, {"block_0": {}})
    with pytest.raises(ValueError, match=r"initial_state\['conv'\].*Received: shape=\(3, 3, 32\)"):
        backbone.step(features, backbone.init_cache(3, LENGTH))
    with pytest.raises(ValueError, match=r"mask must have the shape \(b, t\)"):
        backbone(features, padding_mask=np.ones((BATCH, LENGTH, LENGTH), bool))

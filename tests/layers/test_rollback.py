"""Rollback against stepping with only the kept tokens from the earlier cache."""

import keras
import numpy as np
import pytest
from checks import full, jitted, numpy

from keras_jamba.layers import AttentionLayer, FeedForward, GatedConvLayer, JambaBlock, MambaLayer

BEFORE, LENGTH = 4, 6
COUNTS = np.array([0, 3, LENGTH, 1], "int32")
MIXERS = {
    "mamba": lambda: MambaLayer(8, d_state=4, mixer_rms_norm=True, proj_bias=True),
    "gated_conv": lambda: GatedConvLayer(8, proj_bias=True),
    "attention": lambda: AttentionLayer(8, num_heads=4, num_kv_heads=2),
    # The cache has fewer slots than the step has tokens.
    "window": lambda: AttentionLayer(8, num_heads=2, attention_window=4),
    "sinks": lambda: AttentionLayer(8, num_heads=2, attention_window=2, attention_sinks=2),
}


@pytest.fixture(scope="module", params=MIXERS)
def layer(request):
    keras.utils.set_random_seed(0)
    layer = MIXERS[request.param]()
    layer.build((None, None, 8))
    for variable in layer.trainable_variables:
        if variable.path.endswith("bias"):
            variable.assign(np.linspace(-1, 1, variable.shape[0]))
    return layer


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).standard_normal((4, BEFORE + LENGTH, 8)).astype("float32")


def documents(padding):
    """Returns segment ids and optionally a mask of all tokens, including those before the step."""
    ids = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 3], [0] * 4 + [1] * 6, [0] * 10, [5] * 5 + [6] * 5], "int32")
    mask = np.random.default_rng(1).random(ids.shape) > 0.35
    mask[3, BEFORE : BEFORE + 2] = False
    return {"segment_ids": ids} | ({"mask": mask} if padding else {})


@full("jax")
@pytest.mark.parametrize("padding", [False, True], ids=["", "padding"])
def test_rollback_equals_stepping_with_only_the_kept_tokens(layer, features, padding):
    given = documents(padding)
    first, rest = ({name: x[:, here] for name, x in given.items()} for here in (slice(BEFORE), slice(BEFORE, None)))

    def both(x, count):
        _, cache = layer.step(x[:, :BEFORE], layer.init_cache(4, 12), **first)
        plain, _ = layer.step(x[:, BEFORE:], cache, **rest)
        outputs, _, rollback_state = layer.step(x[:, BEFORE:], cache, **rest, return_rollback_state=True)
        # The mask removes the discarded tokens; the layers' own tests check masks.
        kept = np.arange(LENGTH)[None] < COUNTS[:, None]
        _, expected = layer.step(x[:, BEFORE:], cache, **rest | {"mask": kept & rest.get("mask", True)})
        return outputs, plain, layer.rollback(rollback_state, count), expected

    outputs, plain, found, expected = numpy(jitted(both)(features, COUNTS))
    np.testing.assert_array_equal(outputs, plain)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == expected[name].dtype
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def found(layer, features):
    """Returns the results of one step and of its rollbacks, from one compiled program."""
    # Each row holds its kept tokens, one more token, then padding.
    rows = np.zeros((4, BEFORE + LENGTH + 1, 8), "float32")
    for row, count in enumerate(COUNTS):
        rows[row, : BEFORE + count + 1] = [*features[row, : BEFORE + count], features[row, -1]]
    real = np.arange(BEFORE + LENGTH + 1)[None] <= BEFORE + COUNTS[:, None]

    def step_and_roll_back(x, rows, count, nothing, everything):
        _, before = layer.step(x[:, :BEFORE], layer.init_cache(4, 12))
        _, after, rollback_state = layer.step(x[:, BEFORE:], before, return_rollback_state=True)
        cache, rollback_states = before, []
        for here in (slice(BEFORE, BEFORE + 1), slice(BEFORE + 1, BEFORE + 2), slice(BEFORE + 2, None)):
            _, cache, one = layer.step(x[:, here], cache, return_rollback_state=True)
            rollback_states.append(one)
        back = layer.rollback(rollback_state, count)
        found = dict(
            before=before,
            after=after,
            rollback_state=rollback_state,
            back=back,
            by_chunks=layer.rollback(rollback_states, count),
        )
        found |= dict(
            nothing=layer.rollback(rollback_state, nothing), everything=layer.rollback(rollback_state, everything)
        )
        return found | dict(outputs=layer.step(x[:, -1:], back)[0], rows=layer(rows, mask=real))

    return numpy(jitted(step_and_roll_back)(features, rows, COUNTS, np.zeros(4, "int32"), np.full(4, LENGTH, "int32")))


def same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=tolerance, err_msg=name)


def test_each_row_continues_from_its_kept_tokens(found):
    for row, count in enumerate(COUNTS):
        np.testing.assert_allclose(found["outputs"][row, 0], found["rows"][row, BEFORE + count], atol=2e-5)


def test_keeping_no_or_all_tokens_gives_the_cache_before_or_after(found):
    same(found["nothing"], found["before"])
    same(found["everything"], found["after"])


def test_rollback_states_of_consecutive_steps_combine(found):
    same(found["by_chunks"], found["back"], 2e-6)


def test_rollback_runs_no_projection(layer, found, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a projection ran")

    monkeypatch.setattr(keras.layers.Dense, "call", refuse)
    rollback_state = keras.tree.map_structure(keras.ops.convert_to_tensor, found["rollback_state"])
    same(numpy(jitted(layer.rollback)(rollback_state, COUNTS)), found["back"])


@pytest.mark.parametrize(
    ("rollback_state", "count", "message"),
    [
        (None, [0, 3, 7, 1], r"count must be from 0 to the 6 tokens of the step. Received: count=\[0, 3, 7, 1\]"),
        (None, [0, -1, 6, 1], "count must be from 0 to the 6 tokens"),
        (None, [0, 3], r"count must be integers of shape \(b,\) = \(4,\).*Received: shape=\(2,\)"),
        (None, [0.0] * 4, "count must be integers.*dtype=float32"),
        ({"cache": {}}, COUNTS, "rollback_state must come from a step of this layer.*Received: dict"),
        ({"cache": {}, "tokens": {"y": 0}}, COUNTS, r"Received: \['y'\]"),
        ([{"cache": {}, "tokens": {"x": 0}}, {}], COUNTS, r"must be of one kind. Received: \[\['x'\], None\]"),
    ],
)
def test_invalid_rollback_states_and_counts_are_reported(layer, found, rollback_state, count, message):
    rollback_state = found["rollback_state"] if rollback_state is None else rollback_state
    with pytest.raises(ValueError, match=message):
        layer.rollback(rollback_state, keras.ops.convert_to_tensor(count))


def test_a_block_refuses_rollback_with_a_mixer_without_rollback(features):
    class Plain(keras.layers.Layer):
        def step(self, inputs, cache, mask=None, segment_ids=None):
            return inputs, cache

    block = JambaBlock(Plain(), FeedForward(8, 8))
    for call in (lambda: block.step(features, {}, return_rollback_state=True), lambda: block.rollback({}, COUNTS)):
        with pytest.raises(ValueError, match="a mixer with a rollback.*Received: a Plain"):
            call()


@pytest.mark.parametrize("kind", [MambaLayer, GatedConvLayer])
def test_a_rollback_state_needs_a_state_and_tensors(kind):
    layer, x = kind(8), np.zeros((2, 3, 8), "float32")
    with pytest.raises(ValueError, match="Received: return_rollback_state=True without a state. Pass init_cache"):
        layer(x, return_rollback_state=True)
    with pytest.raises(ValueError, match="without a state"):
        layer.step(x, None, return_rollback_state=True)
    with pytest.raises(ValueError, match="Call the layer on tensors"):
        layer(keras.Input((3, 8)), return_rollback_state=True)

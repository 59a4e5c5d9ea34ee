"""Documents and resets: every layer isolates each document, in one call and in several steps."""

import hypothesis
import keras
import numpy as np
import pytest
from checks import draws, full, jitted, numpy
from hypothesis import strategies as st

from keras_jamba import JambaBackbone
from keras_jamba.layers import AttentionLayer, GatedConvLayer, JambaBlock, MambaLayer

BATCH, LENGTH, WIDTH = 2, 8, 8
LAYERS = {
    "mamba": lambda: MambaLayer(WIDTH, d_state=4),
    "gated_conv": lambda: GatedConvLayer(WIDTH),
    "attention": lambda: AttentionLayer(WIDTH, num_heads=2, num_kv_heads=1),
    "window": lambda: AttentionLayer(WIDTH, num_heads=2, attention_window=3),
    "sinks": lambda: AttentionLayer(WIDTH, num_heads=2, attention_window=2, attention_sinks=2),
    "block": lambda: JambaBlock(MambaLayer(WIDTH, d_state=4), None),
    "backbone": lambda: JambaBackbone(WIDTH, num_layers=2, mamba_ratio=1, num_heads=2, moe_frequency=0, d_ff=8),
}


class Case:
    """A layer with its compiled call and its compiled step."""

    def __init__(self, name):
        keras.utils.set_random_seed(0)
        self.layer, self.mask = LAYERS[name](), "padding_mask" if name == "backbone" else "mask"
        self.layer.build((None, None, WIDTH))
        self.program, self.step = jitted(self.layer), jitted(self.layer.step)

    def arguments(self, sequence, span=slice(None)):
        named = {self.mask: sequence["mask"], **{k: sequence[k] for k in ("segment_ids", "reset_mask")}}
        return {name: x[:, span] for name, x in named.items() if x is not None}

    def alone(self, x):
        """Returns the outputs of one document `(t, d)`; trailing zeros keep one compiled length."""
        filled = np.zeros((BATCH, LENGTH, WIDTH), "float32")
        filled[0, : len(x)] = x
        return numpy(self.program(filled))[0, : len(x)]


@pytest.fixture(scope="module", params=LAYERS)
def case(request):
    return Case(request.param)


@st.composite
def sequences(draw):
    per_token = lambda values: np.array(  # noqa: E731
        draw(st.lists(values, min_size=BATCH * LENGTH, max_size=BATCH * LENGTH))
    ).reshape(BATCH, LENGTH)
    return {
        "features": np.random.default_rng(draw(st.integers(0, 99)))
        .standard_normal((BATCH, LENGTH, WIDTH))
        .astype("float32"),
        "mask": per_token(st.sampled_from([True, True, False])) if draw(st.booleans()) else None,
        "segment_ids": per_token(st.sampled_from([4, 4, 4, 0, 9])) if draw(st.booleans()) else None,
        "reset_mask": per_token(st.sampled_from([False, False, True])) if draw(st.booleans()) else None,
    }


def documents(sequence, row):
    """Returns one list of real token positions per document of a row, by the definition."""
    mask, ids, resets = (sequence[name] for name in ("mask", "segment_ids", "reset_mask"))
    found, previous, reset = [], None, False
    for t in range(LENGTH):
        reset |= resets is not None and bool(resets[row, t])
        if mask is not None and not mask[row, t]:
            continue
        changed = previous is not None and ids is not None and ids[row, t] != ids[row, previous]
        if previous is None or reset or changed:
            found.append([])
        found[-1].append(t)
        previous, reset = t, False
    return found


@full("jax", "tensorflow")
@draws(25)
@hypothesis.given(sequence=sequences(), cuts=st.sampled_from([(4,), (2, 4), (2, 4, 6)]), stepped=st.booleans())
def test_packing_and_stepping_never_change_a_document(case, sequence, cuts, stepped):
    features, outputs = sequence["features"], []
    if stepped:
        cache = case.layer.init_cache(BATCH, LENGTH)
        for a, b in zip((0, *cuts), (*cuts, LENGTH), strict=True):
            y, cache = case.step(features[:, a:b], cache, **case.arguments(sequence, slice(a, b)))
            outputs.append(numpy(y))
    else:
        outputs.append(numpy(case.program(features, **case.arguments(sequence))))
    outputs = np.concatenate(outputs, axis=1)
    for row in range(BATCH):
        for tokens in documents(sequence, row):
            expected = case.alone(features[row, tokens])
            np.testing.assert_allclose(outputs[row, tokens], expected, atol=1e-4, err_msg=f"row {row}, {tokens}")


@pytest.mark.parametrize("kind", ["mamba", "gated_conv", "attention"])
def test_bidirectional_layers_isolate_documents_and_resets(kind):
    both = {"bidirectional": True} if kind != "attention" else {"causal": False}
    layer = {"mamba": MambaLayer, "gated_conv": GatedConvLayer, "attention": AttentionLayer}[kind](
        WIDTH, **both, **({"num_heads": 2} if kind == "attention" else {})
    )
    features = np.random.default_rng(0).standard_normal((1, 9, WIDTH)).astype("float32")
    layer.build(features.shape)
    call = jitted(layer)
    resets = np.isin(np.arange(9), [3, 6])[None]
    expected = np.concatenate([numpy(call(features[:, a : a + 3])) for a in (0, 3, 6)], axis=1)
    for given in ({"segment_ids": np.array([[5, 5, 5, 1, 1, 1, 5, 5, 5]])}, {"reset_mask": resets}):
        np.testing.assert_allclose(numpy(call(features, **given)), expected, atol=2e-5)


@full("jax")
def test_rollback_undoes_resets_of_discarded_tokens(case):
    features = np.random.default_rng(0).standard_normal((BATCH, LENGTH, WIDTH)).astype("float32")
    resets = np.isin(np.arange(LENGTH), [3, 6])[None].repeat(BATCH, axis=0)

    def both(x, resets, count):
        _, cache = case.layer.step(x[:, :2], case.layer.init_cache(BATCH, LENGTH))
        rollback_state = case.layer.step(x[:, 2:], cache, reset_mask=resets[:, 2:], return_rollback_state=True)[2]
        back = case.layer.rollback(rollback_state, count)
        return case.layer.step(x[:, :1], back)[0], case.layer.step(
            x[:, :1], case.layer.step(x[:, 2:5], cache, reset_mask=resets[:, 2:5])[1]
        )[0]

    found, expected = numpy(jitted(both)(features, resets, np.array([3, 0], "int32")))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    held = numpy(
        jitted(
            lambda x: case.layer.step(x[:, :1], case.layer.step(x[:, :2], case.layer.init_cache(BATCH, LENGTH))[1])[0]
        )(features)
    )
    np.testing.assert_allclose(found[1], held[1], atol=1e-5)


@full("jax")
def test_a_cache_with_capacity_for_each_document_never_fills_up():
    layer = AttentionLayer(WIDTH, num_heads=2)
    features = np.random.default_rng(0).standard_normal((1, 9, WIDTH)).astype("float32")
    layer.build(features.shape)
    step, cache, outputs = jitted(layer.step), layer.init_cache(1, 3), []
    for t in range(9):
        y, cache = step(features[:, t : t + 1], cache, reset_mask=np.array([[t in (2, 5, 6)]]))
        outputs.append(numpy(y))
    spans = [(0, 2), (2, 5), (5, 6), (6, 9)]
    expected = [numpy(layer(features[:, a:b])) for a, b in spans]
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), np.concatenate(expected, axis=1), atol=2e-5)
    # grow_cache appends capacity to a ring that a reset has restarted.
    grown = layer.grow_cache(cache, 5)
    y, _ = step(features[:, :1], grown, reset_mask=np.array([[False]]))
    expected = numpy(layer(np.concatenate([features[:, 6:9], features[:, :1]], axis=1)))[:, -1:]
    np.testing.assert_allclose(numpy(y), expected, atol=2e-5)


def test_a_reset_mask_of_another_shape_is_an_error(case):
    features = np.zeros((BATCH, LENGTH, WIDTH), "float32")
    with pytest.raises(ValueError, match=r"reset_mask must have the shape \(b, t\) = \(2, 8\).*Received.*\(2, 7\)"):
        case.layer(features, reset_mask=np.zeros((BATCH, 7), bool))

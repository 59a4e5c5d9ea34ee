"""States, masks and documents: chunking, masking and packing never change a document's outputs or states."""

import hypothesis
import numpy as np
import oracles
import pytest
from checks import close, draws, full, gradients, numpy
from hypothesis import strategies as st
from keras import ops

from keras_jamba import _backend
from keras_jamba.ops import causal_depthwise_conv, implementations, selective_scan

BATCH, LENGTH, CHANNELS, STATE, WIDTH = 2, 12, 6, 4, 4
CONVOLUTIONS = {"cpu": ["native", "portable"], "gpu": ["triton", "portable"]}[_backend.tensors.platform()]


@st.composite
def sequences(draw):
    """Draws a seed, an optional mask, optional segment ids, cuts, and whether an initial state is given."""
    tokens = lambda values: st.lists(  # noqa: E731
        st.lists(values, min_size=LENGTH, max_size=LENGTH), min_size=BATCH, max_size=BATCH
    )
    mask = draw(st.none() | tokens(st.booleans()))
    # A change of the id starts a document. Ids may repeat and decrease.
    ids = draw(st.none() | tokens(st.sampled_from([0, 0, 0, 7, 3])))
    return {
        "seed": draw(st.integers(0, 1000)),
        "mask": None if mask is None else np.array(mask),
        "segment_ids": None if ids is None else np.array(ids, "int32"),
        "cuts": draw(st.sets(st.integers(1, LENGTH - 1), max_size=3)),
        "start": draw(st.booleans()),
    }


def spans(case):
    """Returns slices of the tokens between the cuts.

    Packed rows are not cut: a chunk that starts a document would require a new state.
    """
    cuts = case["cuts"] if case["segment_ids"] is None else ()
    ends = [0, *sorted(cuts), LENGTH]
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def chunk(x, span):
    return None if x is None else x[:, span]


def scan_inputs(seed):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    sequence, states = (BATCH, LENGTH, CHANNELS), (BATCH, LENGTH, STATE)
    tokens = dict(
        u=normal(*sequence), delta=normal(*sequence), B=normal(*states), C=normal(*states), z=normal(*sequence)
    )
    others = dict(A=-np.exp(normal(CHANNELS, STATE)), D=normal(CHANNELS), delta_bias=normal(CHANNELS))
    return tokens, others, normal(BATCH, CHANNELS, STATE)


def scan_alone(tokens, others, state, case):
    """Returns the outputs and last states of a scan of every document alone."""

    def run(row):
        def of(indices, state):
            selected = {name: x[row : row + 1, indices] for name, x in tokens.items()}
            y, last = oracles.selective_scan(**selected, **others, delta_softplus=True, initial_state=state[None])
            return y[0], last[0]

        return of

    rows = [
        oracles.documents_alone(run(i), state[i], LENGTH, *(row_of(case[k], i) for k in ("mask", "segment_ids")))
        for i in range(BATCH)
    ]
    ys = [y if y.shape[1] else np.zeros((LENGTH, CHANNELS)) for y, _ in rows]
    return np.stack(ys), np.stack([last for _, last in rows])


def row_of(x, row):
    return None if x is None else x[row]


@full("jax")
@pytest.mark.parametrize("implementation", implementations())
@draws(150)
@hypothesis.given(case=sequences())
def test_a_chunked_scan_equals_every_document_alone(implementation, case):
    tokens, others, initial = scan_inputs(case["seed"])
    initial = initial if case["start"] else np.zeros_like(initial)
    state, outputs = (initial if case["start"] else None), []
    for span in spans(case):
        given = {name: x[:, span] for name, x in tokens.items()} | others
        y, state = selective_scan(
            **given,
            delta_softplus=True,
            initial_state=state,
            return_last_state=True,
            mask=chunk(case["mask"], span),
            segment_ids=chunk(case["segment_ids"], span),
            implementation=implementation,
        )
        outputs.append(numpy(y))
    expected, last = scan_alone(tokens, others, initial, case)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(numpy(state), last, atol=2e-5, rtol=2e-5)


@full("jax", "tensorflow")
@pytest.mark.parametrize("implementation", CONVOLUTIONS)
@draws(150)
@hypothesis.given(case=sequences())
def test_a_chunked_convolution_equals_every_document_alone(implementation, case):
    rng = np.random.default_rng(case["seed"])
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    x, kernel, bias = normal(BATCH, LENGTH, CHANNELS), normal(WIDTH, CHANNELS), normal(CHANNELS)
    initial = normal(BATCH, WIDTH - 1, CHANNELS) * case["start"]
    state, outputs = (initial if case["start"] else None), []
    for span in spans(case):
        y, state = causal_depthwise_conv(
            x[:, span],
            kernel,
            bias,
            state,
            return_last_state=True,
            mask=chunk(case["mask"], span),
            segment_ids=chunk(case["segment_ids"], span),
            implementation=implementation,
        )
        outputs.append(numpy(y))
    for row in range(BATCH):
        run = lambda indices, state, row=row: oracles.causal_depthwise_conv(x[row, indices], kernel, bias, state)  # noqa: E731
        given = (row_of(case[k], row) for k in ("mask", "segment_ids"))
        expected, last = oracles.documents_alone(run, initial[row], LENGTH, *given)
        expected = expected if expected.shape[1] else np.zeros((LENGTH, CHANNELS))
        np.testing.assert_allclose(np.concatenate(outputs, axis=1)[row], expected, atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(numpy(state)[row], last, atol=2e-5, rtol=2e-5)


@full("tensorflow")
@pytest.mark.parametrize("implementation", [name for name in implementations() if name != "reference"])
def test_gradients_with_masks_documents_and_states_match_the_reference(implementation):
    tokens, others, initial = scan_inputs(0)
    arrays = tokens | others | {"initial_state": initial}
    rng = np.random.default_rng(1)
    mask = ops.convert_to_tensor(rng.random((BATCH, LENGTH)) > 0.3)
    segment_ids = ops.convert_to_tensor(np.sort(rng.integers(0, 3, (BATCH, LENGTH)), axis=1).astype("int32"))
    weights = [
        ops.convert_to_tensor(rng.standard_normal(s).astype("float32")) for s in (tokens["u"].shape, initial.shape)
    ]

    def loss(name):
        def function(*tensors):
            given = dict(zip(arrays, tensors, strict=True))
            outputs = selective_scan(
                **given,
                delta_softplus=True,
                return_last_state=True,
                mask=mask,
                segment_ids=segment_ids,
                implementation=name,
            )
            return sum(ops.sum(x * w) for x, w in zip(outputs, weights, strict=True))

        return function

    actual, expected = (gradients(loss(name), list(arrays.values())) for name in (implementation, "reference"))
    for name, a, e in zip(arrays, actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5, err_msg=name)


@full("jax")
@pytest.mark.parametrize("implementation", implementations())
def test_outputs_match_the_recorded_ones_with_initial_states_and_resets(implementation):
    from test_scan import golden

    inputs, recorded = golden("64")
    scan = lambda **more: selective_scan(  # noqa: E731
        **inputs, delta_softplus=True, return_last_state=True, implementation=implementation, **more
    )
    segment_ids = np.cumsum(recorded["reset"], axis=1).astype("int32")
    for case, given in (("h0", {"initial_state": recorded["h0"]}), ("reset", {"segment_ids": segment_ids})):
        y, last = scan(**given)
        close(y, np.swapaxes(recorded[f"{case}_out_f64"], 1, 2), absolute=2e-5)
        close(last, recorded[f"{case}_last_state_f64"], absolute=2e-5)

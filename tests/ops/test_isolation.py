"""NaN and infinity of one document or of padding never reach other documents, in outputs, states and gradients."""

import numpy as np
import pytest
from checks import gradient_of, jitted, numpy
from keras import ops
from test_scan import NAMES, draw

from keras_jamba.ops import (
    attention_implementations,
    causal_depthwise_conv,
    grouped_query_attention,
    implementations,
    selective_scan,
)
from keras_jamba.ops.attention import blocks as attention_blocks

BAD = (np.nan, np.inf, -np.inf, 3e38)
PER_TOKEN = ("u", "delta", "B", "C", "z")
# Borders of documents inside a chunk of an implementation, at its ends, and side by side.
BORDERS = {70: (20, 33), 130: (64, 128), 40: (32, 39), 9: (1, 2)}
LENGTHS = {"native": BORDERS, "portable": BORDERS, "associative": (40, 9), "reference": (9,)}
SCANS = [(name, length) for name in implementations() for length in LENGTHS.get(name, BORDERS)]


def poisoned(x, bad, value):
    """Returns `x (b, t, ...)` with `value` at the tokens of `bad` `(b, t)`."""
    return np.where(bad.reshape(*bad.shape, *(1 for _ in x.shape[2:])), np.float32(value), x)


def differentiated(op, names):
    """Returns a function of named inputs and weights: the outputs of `op`, and the gradients of their weighted sum."""
    call = lambda *tensors: op(**dict(zip(names, tensors, strict=True)))  # noqa: E731

    def loss(*tensors):
        outputs = call(*tensors[: len(names)])
        return sum(ops.sum(x * w) for x, w in zip(outputs, tensors[len(names) :], strict=True))

    outputs, grads = jitted(call), gradient_of(loss)

    def run(inputs, weights):
        tensors = [inputs[name] for name in names]
        return numpy(outputs(*tensors)), dict(zip(names, grads([*tensors, *weights]), strict=False))

    return run


def documents(length):
    """Returns segment ids of two rows: three documents, and two other ones."""
    first, second = BORDERS[length]
    ids = np.zeros((2, length), "int32")
    ids[0, first:], ids[0, second:], ids[1, second:] = 1, 2, 1
    return ids


def each_document(ids):
    """Yields `(value, bad)`: one of the values, and the tokens `(b, t)` of a document, for every document."""
    values = iter(BAD * 2)
    for row in range(len(ids)):
        for document in np.unique(ids[row]):
            yield next(values), (ids == document) & (np.arange(len(ids))[:, None] == row)


def padding(length):
    """Returns a mask with padding at the start, in the middle and at the end, and a row without any."""
    mask = np.ones((2, length), bool)
    mask[0, : length // 4], mask[0, length // 2], mask[0, length - length // 4 :] = False, False, False
    return mask


def assert_equal_at(good, found, where, names):
    for name in names:
        a, e = found[name][where], good[name][where]
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6 * max(1, np.abs(e).max(initial=0)), err_msg=name)


def assert_documents_are_isolated(run, inputs, per_token, ids, shapes, initial="initial_state"):
    """Damages the inputs `per_token` of one document, and the gradient of its outputs.

    Compares the outputs and gradients of all other documents; `shapes`: of the outputs, of which the second is a state.
    """
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    (y, last), grads = run(inputs, weights)
    for value, bad in each_document(ids):
        damaged = inputs | {name: poisoned(inputs[name], bad, value) for name in per_token}
        (found_y, found_last), found = run(damaged, [poisoned(weights[0], bad, np.nan), weights[1]])
        assert not np.array_equal(found_y[bad], y[bad]), "the damage has no effect"
        np.testing.assert_allclose(found_y[~bad], y[~bad], rtol=1e-5, atol=1e-6)
        assert_equal_at(grads, found, ~bad, per_token)
        for row in range(len(ids)):
            if not bad[row, -1]:
                np.testing.assert_allclose(found_last[row], last[row], rtol=1e-5, atol=1e-6)
            if initial and not bad[row, 0]:
                assert_equal_at(grads, found, row, [initial])


def assert_padding_is_ignored(run, inputs, per_token, mask, shapes):
    """Damages padding, and the gradient of its outputs: nothing may change, also no gradient of a weight."""
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    outputs, grads = run(inputs, weights)
    for value in BAD:
        damaged = inputs | {name: poisoned(inputs[name], ~mask, value) for name in per_token}
        found, found_grads = run(damaged, [poisoned(weights[0], ~mask, np.nan), *weights[1:]])
        for a, e in zip(found, outputs, strict=True):
            np.testing.assert_array_equal(a, e)
        assert_equal_at(grads, found_grads, ..., inputs)


def scan_of(implementation, **given):
    options = dict(delta_softplus=True, return_last_state=True, implementation=implementation)
    return differentiated(lambda **tensors: selective_scan(**tensors, **given, **options), NAMES)


@pytest.mark.parametrize(("implementation", "length"), SCANS)
def test_a_damaged_document_leaves_the_scan_of_other_documents_unchanged(implementation, length):
    inputs, ids = draw(2, length, 6, state=5), documents(length)
    shapes = inputs["u"].shape, inputs["initial_state"].shape
    assert_documents_are_isolated(scan_of(implementation, segment_ids=ids), inputs, PER_TOKEN, ids, shapes)


@pytest.mark.parametrize(("implementation", "length"), SCANS)
def test_damaged_padding_leaves_the_scan_unchanged(implementation, length):
    inputs, mask = draw(2, length, 6, state=5), padding(length)
    shapes = inputs["u"].shape, inputs["initial_state"].shape
    assert_padding_is_ignored(scan_of(implementation, mask=mask), inputs, PER_TOKEN, mask, shapes)


CONVOLUTION = ["x", "kernel", "bias", "initial_state"]
CONVOLUTIONS = [name for name in ("native", "triton", "portable") if name in implementations() or name == "portable"]


def convolution_of(implementation, **given):
    options = dict(return_last_state=True, activation="silu", implementation=implementation)
    return differentiated(lambda **tensors: causal_depthwise_conv(**tensors, **given, **options), CONVOLUTION)


def convolution_inputs(length):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    return dict(x=normal(2, length, 6), kernel=normal(4, 6), bias=normal(6), initial_state=normal(2, 3, 6))


@pytest.mark.parametrize("length", [40, 9])
@pytest.mark.parametrize("implementation", CONVOLUTIONS)
def test_a_damaged_document_leaves_the_convolution_of_other_documents_unchanged(implementation, length):
    inputs, ids = convolution_inputs(length), documents(length)
    shapes = inputs["x"].shape, inputs["initial_state"].shape
    assert_documents_are_isolated(convolution_of(implementation, segment_ids=ids), inputs, ["x"], ids, shapes)


@pytest.mark.parametrize("length", [40, 9])
@pytest.mark.parametrize("implementation", CONVOLUTIONS)
def test_damaged_padding_leaves_the_convolution_unchanged(implementation, length):
    inputs, mask = convolution_inputs(length), padding(length)
    shapes = inputs["x"].shape, inputs["initial_state"].shape
    assert_padding_is_ignored(convolution_of(implementation, mask=mask), inputs, ["x"], mask, shapes)


ATTENTION = ["query", "key", "value"]


def attention_inputs(length=9, heads=4, width=4):
    rng = np.random.default_rng(0)
    normal = lambda h: rng.standard_normal((2, length, h, width)).astype("float32")  # noqa: E731
    return dict(query=normal(heads), key=normal(2), value=normal(2))


# Also "triton" on a GPU.
FORMS = [name for name, reason in attention_implementations().items() if name != "fused" and reason is None]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """An implementation of attention. The blocks are small, so that a row has several."""
    monkeypatch.setattr(attention_blocks, "_QUERIES", 4)
    monkeypatch.setattr(attention_blocks, "_KEYS", 2)
    monkeypatch.setattr(attention_blocks, "_FEW_QUERIES", 1)
    return request.param


@pytest.mark.parametrize("causal", [False, True])
def test_a_damaged_document_leaves_the_attention_of_other_documents_unchanged(causal, form):
    inputs, ids = attention_inputs(), documents(9)
    options = dict(causal=causal, segment_ids=ids, implementation=form)
    attend = lambda **given: (grouped_query_attention(**given, **options), ops.zeros((2, 1)))  # noqa: E731
    run = differentiated(attend, ATTENTION)
    assert_documents_are_isolated(run, inputs, ATTENTION, ids, ((2, 9, 4, 4), (2, 1)), initial=None)


@pytest.mark.parametrize("damaged", [*ATTENTION, "gradient"])
def test_damage_in_attention_reaches_exactly_the_tokens_that_see_it(damaged, form):
    inputs = attention_inputs()
    weights = [np.ones((2, 9, 4, 4), "float32")]
    bad = np.arange(9)[None] == np.array([[4], [6]])
    options = dict(causal=True, segment_ids=np.zeros((2, 9), "int32"), implementation=form)
    if damaged == "gradient":
        weights[0] = poisoned(weights[0], bad, np.nan)
    else:
        inputs[damaged] = poisoned(inputs[damaged], bad, np.nan)
    run = differentiated(lambda **given: (grouped_query_attention(**given, **options),), ATTENTION)
    (y,), grads = run(inputs, weights)
    later, earlier = np.logical_or.accumulate(bad, 1), np.logical_or.accumulate(bad[:, ::-1], 1)[:, ::-1]
    by_query = later if damaged in ("key", "value") else bad
    by_key = np.ones_like(bad) if damaged in ("key", "value") else earlier
    damaged_outputs = np.zeros_like(bad) if damaged == "gradient" else by_query
    is_damaged = lambda x: np.isnan(x).any((2, 3))  # noqa: E731
    np.testing.assert_array_equal(is_damaged(y), damaged_outputs)
    np.testing.assert_array_equal(is_damaged(grads["query"]), by_query)
    for name in ("key", "value"):
        np.testing.assert_array_equal(is_damaged(grads[name]), by_key)


@pytest.mark.parametrize("width", [4, 512])
def test_large_values_of_a_document_leave_the_attention_of_others_unchanged(width, form):
    """The sum of products of a wide head would exceed float32."""
    inputs, ids = attention_inputs(width=width), documents(9)
    options = dict(segment_ids=ids, implementation=form)
    run = differentiated(lambda **given: (grouped_query_attention(**given, **options),), ATTENTION)
    weights = [np.ones((2, 9, 4, width), "float32")]
    (expected,), gradients = run(inputs, weights)
    bad = ids == ids[:, -1:]
    for value in (9e17, 3e18):
        (y,), found = run({name: poisoned(x, bad, value) for name, x in inputs.items()}, weights)
        np.testing.assert_allclose(y[~bad], expected[~bad], rtol=1e-5, atol=1e-6)
        for name in ATTENTION:
            np.testing.assert_allclose(found[name][~bad], gradients[name][~bad], rtol=1e-4, atol=1e-5)

"""Attention of documents, padding, windows, sinks, offsets and grouped heads, against float64 NumPy."""

import dataclasses
import functools
import warnings

import hypothesis
import keras
import numpy as np
import oracles
import pytest
from checks import close, draws, full, gradient_of, jitted, numpy
from hypothesis import strategies as st
from keras import ops

from keras_jamba import _backend
from keras_jamba._triton import split_keys as split_keys_launches
from keras_jamba.ops import attention_implementations, attention_weights, grouped_query_attention
from keras_jamba.ops.attention import _dispatch, blocks, dense, native, split_keys, triton

BATCH, TOKENS, KEYS, WIDTH = 2, 21, 29, 4
# JAX has no float64 by default.
DTYPES = {"bfloat16": 3e-2, "float16": 4e-3} | ({} if keras.backend.backend() == "jax" else {"float64": 1e-5})
FORMS = [name for name in attention_implementations() if name != "fused"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks per row, the last of them incomplete."""
    monkeypatch.setattr(blocks, "_QUERIES", 4)
    monkeypatch.setattr(blocks, "_KEYS", 8)
    monkeypatch.setattr(blocks, "_KEYS_OF_FEW", 8)
    # Single queries read the keys in their own layout.
    monkeypatch.setattr(blocks, "_FEW_QUERIES", 1)
    monkeypatch.setattr(split_keys_launches, "tile", lambda *given: (16, 16, 2))


def inputs(seed=0, queries=TOKENS, keys=TOKENS, heads=4, groups=2):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    shapes = (queries, heads), (keys, groups), (keys, groups), (queries, heads)
    return [normal(BATCH, *shape, WIDTH) for shape in shapes]


@functools.cache
def program(**options):
    """Returns a function of query, key, value, output gradient and the marks: outputs, and their gradients."""

    def attend(query, key, value, weights, marks):
        return grouped_query_attention(query, key, value, **options, **marks)

    outputs = jitted(attend)
    gradients = {}

    def run(query, key, value, weights, marks):
        names = tuple(marks)
        if names not in gradients:
            loss = lambda q, k, v, w, *given: ops.sum(  # noqa: E731
                attend(q, k, v, w, dict(zip(names, given, strict=True))) * w
            )
            gradients[names] = _of_floats(loss)
        found = gradients[names](query, key, value, weights, *marks.values())
        return numpy(outputs(query, key, value, weights, marks)), found

    return run


def _of_floats(loss):
    """Returns the gradients of the first three tensors of `loss`; the others are constants."""

    def run(query, key, value, *others):
        others = [ops.convert_to_tensor(x) for x in others]
        return gradient_of(lambda q, k, v: loss(q, k, v, *others))([query, key, value])

    return run


def assert_equals_reference(tensors, seen, marks, **options):
    *qkv, weights = tensors
    outputs, gradients = program(**options)(*qkv, weights, marks)
    np.testing.assert_allclose(outputs, oracles.attention(*qkv, seen), rtol=1e-4, atol=1e-5)
    for found, expected in zip(gradients, oracles.attention_gradients(weights, *qkv, seen), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@st.composite
def rows(draw):
    """Draws documents, padding and options of packed rows."""
    tokens = lambda values: st.lists(  # noqa: E731
        st.lists(values, min_size=TOKENS, max_size=TOKENS), min_size=BATCH, max_size=BATCH
    )
    begins = np.array(draw(tokens(st.sampled_from([False] * 5 + [True]))))
    mask = np.array(draw(tokens(st.sampled_from([True] * 4 + [False]))))
    window = draw(st.sampled_from([None, 1, 3, 9]))
    return {
        "seed": draw(st.integers(0, 1000)),
        "documents": np.cumsum(begins, axis=1).astype("int32"),
        "mask": mask,
        "causal": draw(st.booleans()),
        "window": window,
        "sinks": draw(st.sampled_from([0, 2])) if window else 0,
        "heads": draw(st.sampled_from([(4, 1), (4, 2), (2, 2)])),
    }


@full("jax", "tensorflow")
@pytest.mark.parametrize("form", FORMS)
@draws(50)
@hypothesis.given(case=rows())
def test_packed_and_padded_rows_equal_the_definition(form, case):
    heads, groups = case["heads"]
    tensors = inputs(case["seed"], heads=heads, groups=groups)
    options = {name: case[name] for name in ("causal", "window", "sinks")}
    seen = oracles.seen_pairs(case["documents"], case["mask"], **options)
    marks = dict(mask=case["mask"], segment_ids=case["documents"])
    assert_equals_reference(tensors, seen, marks, **options, implementation=form)


@st.composite
def caches(draw):
    """Draws the filled slots of a cache, the position of the new queries, and options."""
    window = draw(st.sampled_from([None, 4, 11]))
    return {
        "seed": draw(st.integers(0, 1000)),
        "lengths": np.array(draw(st.lists(st.integers(0, KEYS), min_size=BATCH, max_size=BATCH))),
        "before": np.array(draw(st.lists(st.integers(0, KEYS), min_size=BATCH, max_size=BATCH)), "int32"),
        "queries": draw(st.sampled_from([1, 6])),
        "window": window,
        "sinks": draw(st.sampled_from([0, 3])) if window else 0,
    }


@full("jax", "tensorflow")
@pytest.mark.parametrize("form", FORMS)
@draws(50)
@hypothesis.given(case=caches())
def test_queries_at_an_offset_see_the_filled_slots_of_a_cache(form, case):
    tensors = inputs(case["seed"], queries=case["queries"], keys=KEYS)
    filled = np.arange(KEYS)[None] < case["lengths"][:, None]
    # Keys that are hidden have no position; these are the last.
    position = case["before"][:, None] + np.arange(case["queries"])[None]
    distance = position[:, :, None] - np.arange(KEYS)[None, None]
    seen = filled[:, None] & (distance >= 0)
    if case["window"]:
        seen &= (distance < case["window"]) | (np.arange(KEYS) < case["sinks"])
    options = dict(causal=True, window=case["window"], sinks=case["sinks"], implementation=form)
    assert_equals_reference(tensors, seen, dict(key_mask=filled, offset=case["before"]), **options)


@pytest.mark.parametrize("form", FORMS)
def test_documents_padding_and_windows_equal_the_definition(form):
    """The two tests above with one case, on every backend."""
    documents = np.repeat([[0, 1, 2], [0, 0, 1]], TOKENS // 3, axis=1).astype("int32")
    mask = np.arange(TOKENS)[None] != np.array([[4], [TOKENS - 1]])
    options = dict(causal=True, window=4, sinks=2)
    seen = oracles.seen_pairs(documents, mask, **options)
    marks = dict(mask=mask, segment_ids=documents)
    assert_equals_reference(inputs(), seen, marks, **options, implementation=form)


@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(form):
    tensors, mask = inputs(), np.zeros((BATCH, TOKENS), bool)
    outputs, gradients = program(causal=True, implementation=form)(*tensors, dict(mask=mask))
    for x in (outputs, *gradients):
        np.testing.assert_array_equal(x, np.zeros_like(x))


@pytest.mark.parametrize("window, sinks", [(None, 0), (60, 0), (60, 3)])
@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("form", FORMS)
def test_few_queries_after_a_long_cache_read_nothing_that_is_hidden(form, queries, window, sinks):
    query, key, value, weights = inputs(queries=queries, keys=700)
    slots, lengths = np.arange(700)[None], np.array([[650], [300]])
    position = lengths - queries + np.arange(queries)[None]
    near = slots[:, None] > position[..., None] - (window or 1000)
    seen = (slots < lengths)[:, None] & (slots[:, None] <= position[..., None])
    seen &= near | (slots < sinks)[:, None]
    # Slots that are empty hold anything.
    key, value = (np.where((slots < lengths)[..., None, None], x, np.nan) for x in (key, value))
    options = dict(causal=True, window=window, sinks=sinks, implementation=form)
    marks = dict(key_mask=slots < lengths, offset=position[:, 0].astype("int32"))
    found, gradients = program(**options)(query, key, value, weights, marks)
    key, value = np.nan_to_num(key), np.nan_to_num(value)
    close(found, oracles.attention(query, key, value, seen), absolute=1e-5)
    for a, e in zip(gradients, oracles.attention_gradients(weights, query, key, value, seen), strict=True):
        close(a, e, absolute=3e-5)


@pytest.mark.parametrize("dtype, tolerance", DTYPES.items())
@pytest.mark.parametrize("form", FORMS)
def test_attention_keeps_the_dtype_of_the_query(form, dtype, tolerance):
    *qkv, _ = inputs()
    documents = np.repeat([[0, 1, 2]], TOKENS // 3, axis=1).repeat(BATCH, axis=0).astype("int32")
    given = [ops.cast(x, dtype) for x in qkv]
    run = jitted(lambda *qkv: grouped_query_attention(*qkv, True, segment_ids=documents, implementation=form))
    if form in ("native", "split_keys", "triton") and dtype == "float64":
        with pytest.raises(ValueError, match="supports bfloat16, float16 and float32, not float64"):
            run(*given)
        return
    found = run(*given)
    assert found.dtype == given[0].dtype
    seen = oracles.seen_pairs(documents, np.ones_like(documents, bool), causal=True)
    expected = oracles.attention(*(ops.convert_to_numpy(ops.cast(x, "float32")) for x in given), seen)
    np.testing.assert_allclose(ops.convert_to_numpy(ops.cast(found, "float32")), expected, rtol=0, atol=tolerance)


def test_a_long_row_of_documents_takes_the_form_with_linear_memory(monkeypatch):
    ran = []
    monkeypatch.setattr(blocks, "run", lambda *given, run=blocks.run: (ran.append(given[0].shape), run(*given))[1])
    ids = np.zeros((1, 600), "int32")
    long, short = (np.zeros((1, n, 1, 2), "float32") for n in (600, 50))
    grouped_query_attention(long, long, long, True, segment_ids=ids)
    grouped_query_attention(short, short, short, True, segment_ids=ids[:, :50])
    assert [tuple(shape) for shape in ran] == [(1, 600, 1, 2)]


@pytest.mark.parametrize(
    "queries, keys, name", [(1, 300, "native"), (16, 300, "native"), (1, 200, "dense"), (17, 300, "dense")]
)
def test_few_queries_to_many_keys_run_in_the_c_library(queries, keys, name, monkeypatch):
    ran = []
    for form in (native, dense):
        monkeypatch.setattr(form, "run", lambda *given, form=form, run=form.run: (ran.append(form), run(*given))[1])
    query, key = np.ones((1, queries, 2, 8), "float32"), np.ones((1, keys, 1, 8), "float32")
    grouped_query_attention(query, key, key, offset=keys - queries, causal=True)
    assert ran[0] is {"native": native, "dense": dense}[name]


@pytest.mark.parametrize("queries, keys, name", [(1, 300, "split_keys"), (16, 300, "split_keys"), (17, 300, "triton")])
def test_few_queries_to_many_keys_split_the_keys_on_a_gpu(queries, keys, name, monkeypatch):
    monkeypatch.setattr(_backend.kernels, "why_no_triton", lambda: None)
    monkeypatch.setattr(_backend.kernels, "why_no_triton_op", lambda shape: None)
    call = _dispatch._Call("gpu", 2, queries, keys, 16, "bfloat16")
    able = [form for form, module in _dispatch._FASTEST_FIRST["gpu"].items() if module.why_not(call) is None]
    assert able[0] == name


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(queries=None), "the number of tokens is unknown"),
        (dict(queries=17), "17 queries are too many"),
        (dict(queries=257, requested=True), "257 queries are too many"),
        (dict(keys=255), "255 keys are too few"),
        (dict(keys=0, requested=True), "at least one row, query and key"),
        (dict(batch=None), "it requires static shapes"),
        (dict(width=257), "heads of at most 256 channels"),
        (dict(dtype="float64"), "not float64"),
        (dict(platform="cpu"), "it requires a GPU"),
    ],
)
def test_split_keys_says_why_it_cannot_run(changes, reason):
    call = dataclasses.replace(_dispatch._Call("gpu", 2, 1, 300, 16, "bfloat16"), **changes)
    assert reason in split_keys.why_not(call)


@pytest.mark.parametrize("window", [2**32, np.int64(2**40)])
def test_a_window_beyond_all_positions_hides_no_key(window):
    query, key, value, _ = inputs(queries=1, keys=300)
    found = grouped_query_attention(query, key, value, True, window=window, offset=299)
    close(found, numpy(grouped_query_attention(query, key, value)), absolute=1e-6)


def test_the_weights_have_the_window_and_the_sinks():
    query, key, value, _ = inputs()
    weights = attention_weights(query, key, causal=True, window=4, sinks=2)
    expected = grouped_query_attention(query, key, value, True, window=4, sinks=2)
    wide = np.repeat(value, 2, axis=2)
    close(ops.einsum("bhts,bshc->bthc", weights, wide), ops.convert_to_numpy(expected), absolute=1e-5)


QKV = inputs()[:3]


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(sinks=2), "sinks need a window.*Received: sinks=2"),
        (dict(window=0), "window must be.*Received"),
        (dict(implementation="flash"), "must be one of.*Received: implementation='flash'"),
        (dict(key_segment_ids=np.zeros((BATCH, TOKENS), int)), "need segment_ids.*Received"),
        (
            dict(segment_ids=np.full((BATCH, TOKENS), 1 - 2**31), key_segment_ids=np.zeros((BATCH, TOKENS), int)),
            "at least 2 - 2.31.*Received: -2147483647",
        ),
        (dict(mask=np.ones((BATCH, TOKENS, TOKENS), bool)), r"shape \(b, t\).*Received"),
        (dict(offset=np.zeros((3,), int)), "offset.*Received|Received.*offset"),
        (dict(causal=True, mask=np.ones((BATCH, TOKENS), bool), implementation="fused"), "no padding, documents"),
    ],
)
def test_wrong_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        grouped_query_attention(*QKV, **given)


def test_documents_of_queries_alone_need_as_many_keys():
    query, key, value, _ = inputs(queries=5)
    with pytest.raises(ValueError, match="segment_ids alone need as many keys as queries.*Received"):
        grouped_query_attention(query, key, value, segment_ids=np.zeros((BATCH, 5), int))


@pytest.mark.parametrize("documents", [False, True])
def test_second_derivatives_in_blocks_are_refused(documents):
    *qkv, _ = inputs()
    ids = np.zeros((BATCH, TOKENS), "int32") if documents else None

    def loss(q, k, v):
        return ops.sum(ops.square(grouped_query_attention(q, k, v, True, segment_ids=ids, implementation="blocks")))

    with pytest.raises((RuntimeError, ValueError, LookupError), match="second|Reverse-mode|TensorList|gradient"):
        gradient_of(lambda *xs: ops.sum(ops.square(first_gradient(loss, xs))))(qkv)


def first_gradient(loss, tensors):
    """Returns the differentiable gradient of the first tensor."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.grad(loss)(*tensors)
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors[0])
            value = loss(*tensors)
        return tape.gradient(value, tensors[0])
    import torch

    return torch.autograd.grad(loss(*tensors), tensors[0], create_graph=True)[0]


def test_nan_in_hidden_keys_reaches_no_query():
    query, key, value, _ = inputs()
    mask = np.arange(TOKENS)[None].repeat(BATCH, 0) != 3
    expected = numpy(grouped_query_attention(query, key, value, key_mask=mask))
    for x in (key, value):
        x[:, 3] = np.nan
    np.testing.assert_allclose(numpy(grouped_query_attention(query, key, value, key_mask=mask)), expected, rtol=1e-5)
    query[:, 3] = np.nan
    assert np.isfinite(numpy(grouped_query_attention(query, key, value, mask=mask))).all()


@pytest.mark.parametrize("form", FORMS)
def test_nan_behind_a_window_reaches_only_the_queries_that_see_it(form):
    query, key, value, _ = inputs()
    value[:, 0] = np.nan
    outputs = numpy(grouped_query_attention(query, key, value, True, window=3, implementation=form))
    np.testing.assert_array_equal(np.isnan(outputs).any((0, 2, 3)), np.arange(TOKENS) < 3)


def test_a_batch_without_rows_gives_no_rows():
    query, key, value = (np.zeros((0, 600, heads, WIDTH), "float32") for heads in (4, 2, 2))
    assert grouped_query_attention(query, key, value, True, window=3).shape == (0, 600, 4, WIDTH)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="about torch.func and torch.jit")
def test_transforms_of_torch_take_the_form_that_they_support():
    import torch

    query, key, value = (torch.randn(1, 600, heads, WIDTH) for heads in (4, 2, 2))
    attend = lambda x: grouped_query_attention(x, key, value, True, window=5)  # noqa: E731
    loss = lambda x: attend(x).square().sum()  # noqa: E731
    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(query), expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(attend, (query,), check_trace=False)
    torch.testing.assert_close(traced(query), attend(query))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="transforms of PyTorch only")
def test_the_triton_form_refuses_function_transforms(monkeypatch):
    import torch

    monkeypatch.setattr(_backend.kernels, "why_no_triton", lambda: None)
    call = _dispatch._Call("gpu", 1, 64, 64, 16, "float32")
    seen = [triton.why_not(call)]
    torch.func.grad(lambda x: (seen.append(triton.why_not(call)), x.sum())[1])(torch.ones(2))
    assert seen == [None, "the tracer does not support custom gradients"]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of XLA in TensorFlow; runs on tensorflow")
def test_xla_compiles_blocks_once_for_all_documents():
    import tensorflow as tf

    def gradient(query, segment_ids):
        with tf.GradientTape() as tape:
            tape.watch(query)
            given = dict(segment_ids=segment_ids, window=8, implementation="blocks")
            y = grouped_query_attention(query, query, query, causal=True, **given)
        return tape.gradient(y, query)

    given = tf.random.normal((1, 600, 2, 4)), tf.zeros((1, 600), tf.int32)
    program = tf.function(gradient, jit_compile=True, autograph=False).experimental_get_compiler_ir(*given)("hlo")
    # A value that XLA needs as a constant is no parameter, and each new value compiles anew.
    assert program[program.index("ENTRY") :].count(" parameter(") == len(given)

"""Values that compiled code cannot check have a defined meaning or give NaN, never wrong numbers."""

import keras
import numpy as np
import pytest
from checks import full, numpy
from keras import ops

import keras_jamba
from keras_jamba import _backend

ON_HOST = _backend.tensors.platform() == "cpu"
SIZES = dict(d_model=8, num_layers=2, mamba_ratio=1, moe_frequency=0, num_heads=2, d_ff=8)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return keras_jamba.JambaCausalLM(vocab_size=11, **SIZES)


def compiled(function, model):
    """Returns `function` compiled by the backend, or on PyTorch traced as in a decoding loop."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True, autograph=False)
    from keras_jamba._backend.torch._fx_tracing import with_fx_tracing

    return with_fx_tracing(function, model.variables)


@full("jax")
def test_predict_and_fit_start_a_document_at_every_change_of_id():
    backbone = keras_jamba.JambaBackbone(**SIZES)
    x = np.random.default_rng(0).standard_normal((1, 12, 8)).astype("float32")
    right = numpy(backbone(x, segment_ids=np.repeat([[0, 1, 2]], 4, axis=1)))
    features, ids = keras.Input((12, 8)), keras.Input((12,), dtype="int32")
    model = keras.Model([features, ids], backbone(features, segment_ids=ids))
    given = [x, np.repeat([[0, 1, 0]], 4, axis=1)]
    np.testing.assert_allclose(model.predict(given, verbose=0), right, atol=1e-4)
    np.testing.assert_allclose(numpy(backbone(x, segment_ids=given[1])), right, atol=1e-4)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    loss = model.fit(given, np.zeros_like(right), verbose=0).history["loss"]
    np.testing.assert_allclose(loss, [(right.astype("float64") ** 2).mean()], rtol=1e-4)


def test_rows_beyond_the_capacity_of_a_cache_are_nan(model):
    step = compiled(lambda ids, cache: model.step({"token_ids": ids}, cache), model)
    ids = ops.convert_to_tensor(np.array([[3], [4]], "int32"))
    cache = model.init_cache(2, 3)
    # Row 1 has two tokens fewer in its cache.
    cache = {name: dict(state) for name, state in cache.items()}
    for state in cache.values():
        if "length" in state:
            state["length"] = ops.convert_to_tensor(np.array([2, 0], "int32"))
    seen = []
    for _ in range(4):
        logits, cache = step(ids, cache)
        seen.append(np.isnan(numpy(logits)).any(axis=(1, 2)).tolist())
    assert seen == [[False, False], [True, False], [True, False], [True, True]]


@full("jax")
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint16"])
def test_ids_outside_the_vocabulary_are_nan_in_compiled_code(model, dtype):
    if keras.backend.backend() == "jax" and dtype == "int64":
        dtype = "uint32"  # JAX has no 64-bit integers
    call = compiled(lambda ids, mask: model({"token_ids": ids, "padding_mask": mask}), model)
    ids = np.array([[1, 2, 3], [1, 11, 3], [1, 2, 200]])
    mask = np.array([[True] * 3, [True] * 3, [True, True, False]])
    tensors = ops.convert_to_tensor(ids.astype(dtype)), ops.convert_to_tensor(mask)
    logits = numpy(call(*tensors))
    assert np.isnan(logits[1, 1:]).all()
    # A wrong id changes no other row, and padding is not checked.
    right = numpy(model(np.array([[1, 2, 3]], "int32")))
    np.testing.assert_allclose(logits[0], right[0], atol=1e-5)
    np.testing.assert_allclose(logits[2, :2], right[0, :2], atol=1e-5)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "uint16"])
def test_ids_of_every_integer_dtype_are_accepted_and_checked(model, dtype):
    ids = np.array([[1, 2, 3]], dtype)
    right = numpy(model(np.array([[1, 2, 3]], "int32")))
    np.testing.assert_allclose(numpy(model(ids)), right, atol=1e-6)
    np.testing.assert_allclose(model.predict(ids, verbose=0), right, atol=1e-5)
    wrong = np.array([[1, 2, 11]], dtype)
    with pytest.raises(ValueError, match=r"from 0 to vocab_size - 1 = 10. Received: 11 at \[0, 2\]"):
        model.predict(wrong, verbose=0)
    if ON_HOST:
        with pytest.raises(ValueError, match=r"from 0 to vocab_size - 1 = 10. Received: 11 at \[0, 2\]"):
            model(wrong)
    else:
        assert np.isnan(numpy(model(wrong))).any()


@full("jax")
def test_padding_may_hold_any_integer(model):
    ids, mask = np.array([[1, 2, -100], [1, 2, 3]], "int32"), np.array([[True, True, False], [True] * 3])
    right = numpy(model(np.array([[1, 2, 3]], "int32")))
    given = {"token_ids": ids, "padding_mask": mask}
    np.testing.assert_allclose(numpy(model(given))[0, :2], right[0, :2], atol=1e-5)
    assert np.isfinite(numpy(model(given))).all()
    np.testing.assert_allclose(model.predict(given, verbose=0)[0, :2], right[0, :2], atol=1e-5)


@full("jax")
def test_a_classifier_row_without_real_tokens_is_an_error_or_nan():
    model = keras_jamba.JambaClassifier(vocab_size=11, **SIZES)
    ids, mask = np.array([[1, 2], [1, 2]], "int32"), np.array([[True, True], [False, False]])
    if ON_HOST:
        with pytest.raises(ValueError, match="real token. Received: a padding_mask.*row 1"):
            model({"token_ids": ids, "padding_mask": mask})
    call = compiled(lambda ids, mask: model({"token_ids": ids, "padding_mask": mask}), model)
    logits = numpy(call(ops.convert_to_tensor(ids), ops.convert_to_tensor(mask)))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


def test_embeddings_of_another_width_are_an_error(model):
    with pytest.raises(ValueError, match=r"inputs_embeds must have the shape \(b, t, 8\). Received: shape=\(1, 3, 9\)"):
        model({"inputs_embeds": np.zeros((1, 3, 9), "float32")})


def test_a_loop_writes_new_tokens_into_its_own_state_and_never_into_the_callers():
    given = {"cache": ops.zeros((1, 6, 2)), "same": None, "step": ops.zeros((), "int32")}
    given["same"] = given["cache"]

    def body(state):
        index = ops.stack([state["step"] * 0, state["step"]])[None]
        new = ops.cast(state["step"] + 1, "float32") * ops.ones((1, 2))
        caches = {name: ops.scatter_update(state[name], index, new) for name in ("cache", "same")}
        return state["step"] + 1 < 4, caches | {"step": state["step"] + 1}

    loop = _backend.compilation.compiled_while_loop(body, [])
    expected = np.repeat(np.array([1, 2, 3, 4, 0, 0], "float32")[None, :, None], 2, axis=2)
    for _ in range(2):
        end = loop(ops.convert_to_tensor(True), given)
        for name in ("cache", "same"):
            np.testing.assert_array_equal(numpy(end[name]), expected)
            np.testing.assert_array_equal(numpy(given[name]), np.zeros((1, 6, 2)))
    if keras.backend.backend() == "torch":
        # One copy of each cache per loop, not per step.
        assert clones(lambda: loop(ops.convert_to_tensor(True), given)) == 2


def test_a_loop_that_moves_a_tensor_of_its_caller_never_writes_into_it():
    given = {"written": ops.zeros((1, 2)), "moved": ops.zeros((1, 2)), "step": ops.zeros((), "int32")}

    def body(state):
        written = ops.scatter_update(state["written"], [[0, 0]], ops.ones((1,)))
        moved = {"written": state["moved"], "moved": written}
        return state["step"] + 1 < 4, moved | {"step": state["step"] + 1}

    end = _backend.compilation.compiled_while_loop(body, [])(ops.convert_to_tensor(True), given)
    for name in ("written", "moved"):
        np.testing.assert_array_equal(numpy(end[name]), [[1, 0]])
        np.testing.assert_array_equal(numpy(given[name]), np.zeros((1, 2)))


def clones(function):
    """Returns how many tensors `function` copies."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            found.append(str(operation).startswith("aten.clone"))
            return operation(*args, **(kwargs or {}))

    with Recorder():
        function()
    return sum(found)

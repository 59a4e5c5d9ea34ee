"""Training of text models: `fit` prepares texts and ids, and padding changes no result."""

import keras
import numpy as np
import pytest
from checks import full, gradients, jitted, numpy, torch_operations

import keras_jamba
from keras_jamba.models._loss import TokenCrossentropy
from keras_jamba.tokenizers import ByteTokenizer
from keras_jamba.training.data import PackedText

TINY = dict(d_model=16, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=3, d_ff=16)
ROWS = [[5, 6, 7, 8, 9, 10], [3, 4, 5], [7, 1]]


def language(**options):
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(**{"vocab_size": 19} | TINY | options)
    model.compile(keras.optimizers.SGD(0.5))
    return model


def mean_cross_entropy(model):
    """Returns the mean over the tokens of all rows, with one call per row."""
    call = jitted(model)
    return sum(cross_entropy(call, row) for row in ROWS) / sum(len(row) - 1 for row in ROWS)


def cross_entropy(call, row):
    logits = numpy(call(np.array([row])))[0, :-1].astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -log[np.arange(len(row) - 1), row[1:]].sum()


def test_the_loss_is_the_mean_over_real_tokens_plus_the_loss_of_experts():
    model = language()
    expected = mean_cross_entropy(model)
    found = model.evaluate(ROWS, verbose=0, return_dict=True)
    np.testing.assert_allclose(found["loss"], expected + found["moe_aux_loss"], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"from_logits": False}, {"ignore_class": 3}])
def test_the_token_loss_and_its_gradients_equal_keras(options):
    rng = np.random.default_rng(0)
    targets, weights = rng.integers(0, 7, (3, 5)), rng.random((3, 5), "float32")
    logits = rng.random((3, 5, 7), "float32")
    found = []
    for kind in (TokenCrossentropy, keras.losses.SparseCategoricalCrossentropy):
        loss = kind(**{"from_logits": True, "reduction": "mean_with_sample_weight"} | options)
        loss = kind.from_config(loss.get_config())
        call = lambda x, loss=loss: loss(targets, x, weights)  # noqa: E731
        found.append([numpy(call(logits)), *gradients(call, [logits])])
    for a, e in zip(*found, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7)


@full("jax", "tensorflow")
def test_padding_changes_neither_loss_nor_statistics_nor_gradients():
    ids, mask = np.zeros((3, 12), int), np.zeros((3, 12), bool)
    wide = np.random.default_rng(0).integers(0, 19, (3, 12))
    for i, row in enumerate(ROWS):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    results = []
    for tokens in (ids, np.where(mask, ids, wide)):
        model = language()
        history = model.fit({"token_ids": tokens, "padding_mask": mask}, epochs=1, verbose=0).history
        usage = numpy(model.backbone.blocks[1].feed_forward.usage.value)
        results.append(
            (history["loss"], history["accuracy"], usage, [numpy(v.value) for v in model.trainable_variables])
        )
    keras.tree.map_structure(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    model = language()
    history = model.fit(ROWS, epochs=1, verbose=0).history
    np.testing.assert_allclose(history["loss"], results[0][0], rtol=1e-5)
    for v, value in zip(model.trainable_variables, results[0][3], strict=True):
        np.testing.assert_allclose(numpy(v.value), value, rtol=1e-4, atol=1e-6, err_msg=v.path)


def test_a_mask_without_padding_is_omitted():
    ids = np.random.default_rng(0).integers(0, 19, (3, 12))
    mask = np.ones(ids.shape, bool)
    for given in (ids, {"token_ids": ids, "padding_mask": mask}, list(ids)):
        inputs, _, weights = language()._examples(given, None, None, None)
        assert set(inputs) == {"token_ids"} and (weights == 1).all()
    mask[1, -1] = False
    inputs, _, weights = language()._examples({"token_ids": ids, "padding_mask": mask}, None, None, None)
    np.testing.assert_array_equal(inputs["padding_mask"], weights != 0)
    losses = [language().evaluate({"token_ids": ids, "padding_mask": m}, verbose=0) for m in (mask | True, None)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="other backends choose the layout of logits themselves")
def test_training_makes_no_copy_of_the_logits():
    found = torch_operations(lambda: language().train_on_batch(np.array([ROWS[0]]), np.array([ROWS[0]])))
    assert {shape for name, shape in found if name == "aten::_log_softmax"} == {(6, 19)}


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="other backends compile scalars into the step")
def test_a_forward_pass_copies_no_scalar_to_the_device():
    """On a GPU each copy would wait for all queued operations."""
    model, ids = language(), keras.ops.convert_to_tensor([ROWS[0], ROWS[0][::-1]])

    def forward_and_metrics():
        model(ids, training=True)
        for metric in model._moe_metrics.values():
            metric.update_state(keras.ops.ones(()))

    names = {name for name, _ in torch_operations(forward_and_metrics)}
    assert names and not {"aten::lift_fresh", "aten::nonzero", "aten::item"} & names


@full("jax")
def test_packed_rows_have_the_loss_of_their_documents():
    model = language(moe_frequency=0)
    expected = mean_cross_entropy(model)
    found = model.evaluate(PackedText(ROWS, length=11, batch_size=1), verbose=0, return_dict=True)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    packed = {"token_ids": np.array([sum(ROWS, [])]), "segment_ids": np.array([[0] * 6 + [1] * 3 + [2] * 2])}
    np.testing.assert_allclose(model.evaluate(packed, verbose=0, return_dict=True)["loss"], expected, rtol=1e-5)
    resets = {"token_ids": packed["token_ids"], "reset_mask": np.isin(np.arange(11), [6, 9])[None]}
    np.testing.assert_allclose(model.evaluate(resets, verbose=0, return_dict=True)["loss"], expected, rtol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow needs jit_compile=True for XLA")
def test_xla_trains_as_the_graph_does():
    losses = []
    for jit_compile in (False, True):
        model = language()
        model.compile(keras.optimizers.SGD(0.5), jit_compile=jit_compile)
        losses.append(model.fit(ROWS * 2, batch_size=3, epochs=2, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


@full("jax")
def test_texts_get_an_end_token_and_are_truncated():
    model = language(vocab_size=259)
    model.tokenizer = ByteTokenizer()
    rows = [[257, *b"hello", 258], [257, *b"hi", 258]]
    np.testing.assert_allclose(
        model.evaluate(["hello", "hi"], verbose=0, return_dict=True)["loss"],
        model.evaluate(rows, verbose=0, return_dict=True)["loss"],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        model.evaluate(["hello", "hi"], sequence_length=3, verbose=0, return_dict=True)["loss"],
        model.evaluate([row[:4] for row in rows], verbose=0, return_dict=True)["loss"],
        rtol=1e-6,
    )


@full("jax", "tensorflow")
def test_a_model_learns_generates_and_reloads_a_text(tmp_path):
    model = language(vocab_size=259, moe_frequency=0, eos_token_id=258, pad_token_id=256)
    model.tokenizer = ByteTokenizer()
    model.compile(keras.optimizers.Adam(1e-2), sampler="greedy")
    model.fit(["abracadabra"] * 8, validation_data=["abracadabra"], epochs=60, batch_size=8, verbose=0)
    assert model.generate("abr", max_new_tokens=20) == "abracadabra"
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    ids = np.array([[257, 97, 98]])
    np.testing.assert_array_equal(numpy(loaded(ids)), numpy(model(ids)))
    assert loaded.sampler.temperature == 0 and loaded.optimizer is not None
    model.save_to_preset(tmp_path / "preset")
    again = keras_jamba.JambaCausalLM.from_preset(tmp_path / "preset")
    assert again.generate("abr", max_new_tokens=20) == "abracadabra"


@full("jax", "tensorflow")
def test_a_classifier_of_texts_learns_and_ignores_padding():
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaClassifier(259, 2, **TINY | dict(moe_frequency=0))
    model.tokenizer = ByteTokenizer()
    model.compile(keras.optimizers.Adam(1e-2))
    texts, classes = ["good", "very good", "bad", "too bad"], np.array([1, 1, 0, 0])
    model.fit(texts * 4, np.tile(classes, 4), validation_data=(texts, classes), epochs=20, verbose=0)
    assert (model.predict(texts, verbose=0).argmax(-1) == classes).all()
    for text in texts:
        alone = model.predict([text], verbose=0)[0]
        np.testing.assert_allclose(alone, model.predict(texts, verbose=0)[texts.index(text)], rtol=1e-4, atol=1e-5)


def test_logits_to_keep_selects_positions_and_embeddings_are_inputs():
    model = language()
    ids = np.array([ROWS[0], ROWS[0][::-1]])
    logits = numpy(model(ids))
    for kept, expected in ((0, logits), (2, logits[:, -2:]), ([0, 3], logits[:, [0, 3]])):
        np.testing.assert_allclose(numpy(model(ids, logits_to_keep=kept)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(numpy(model({"inputs_embeds": model.embed(ids)})), logits)
    assert model.compute_output_spec(keras.KerasTensor((2, 6), "int32")).shape == (2, 6, 19)


def test_the_config_holds_every_argument():
    import inspect

    for model in (language(), keras_jamba.JambaClassifier(19, 3, **TINY)):
        names = set(inspect.signature(type(model).__init__).parameters) - {"self", "backbone"}
        names |= set(inspect.signature(keras_jamba.JambaBackbone.__init__).parameters) - {"self"}
        assert names == set(model.get_config())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(vocab_size=0), "vocab_size must be an integer of at least 1"),
        (dict(vocab=3), "a constructor argument must be one of"),
        (dict(direction="bidirectional"), "direction of a language model must be one of"),
        (dict(eos_token_id=[1, 19]), "eos_token_id must be an id from 0 to vocab_size - 1 = 18"),
        (dict(d_ff=0), "Experts are feed-forward parts. Received: d_ff=0"),
        (dict(balance_over="all"), "balance_over must be one of"),
    ],
)
def test_bad_arguments_are_reported(options, message):
    with pytest.raises(ValueError, match=message):
        language(**options)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (
            {"token_ids": np.ones((1, 2), int), "inputs_embeds": np.ones((1, 2, 16))},
            "either token_ids or inputs_embeds",
        ),
        ({"ids": np.ones((1, 2), int)}, "either token_ids or inputs_embeds"),
        (np.ones((1, 2), "float32"), "token_ids must be integers. Received: shape=.*dtype=float32. Convert ids"),
        (np.ones(2, int), r"token_ids must have the shape \(b, t\). Received: shape=\(2,\)"),
    ],
)
def test_bad_inputs_are_reported(inputs, message):
    with pytest.raises(ValueError, match=message):
        language()(inputs)


@pytest.mark.parametrize("ids", [[[1, 2, 19]], [[1, -1, 2]], np.array([[3, 2**32 + 3]])])
def test_ids_out_of_the_vocabulary_are_reported_before_training(ids):
    with pytest.raises(ValueError, match="Token ids must be from 0 to vocab_size - 1 = 18. Received"):
        language().fit(ids, verbose=0)


USES = {
    "call": lambda model, ids: model(ids),
    "extract_features": lambda model, ids: model.extract_features(ids),
    "predict": lambda model, ids: model.predict(ids, verbose=0),
    "fit": lambda model, ids: model.fit(ids, verbose=0),
    "fit on rows": lambda model, ids: model.fit(list(ids), verbose=0),
    "evaluate": lambda model, ids: model.evaluate(ids, verbose=0),
    "generate": lambda model, ids: model.generate(ids),
    "generate after padding": lambda model, ids: model.generate({"token_ids": ids, "padding_mask": ids > 0}),
    "prefill": lambda model, ids: model.prefill(ids[1].tolist()),
}


@pytest.fixture(scope="module")
def model():
    return language()


@pytest.mark.parametrize("use", USES)
def test_every_entry_point_reports_the_same_rule_of_token_ids(model, use):
    rule = "Token ids must be from 0 to vocab_size - 1 = 18. Received: 25 (at|in row).*Tokenize with the model's own"
    with pytest.raises(ValueError, match=rule):
        USES[use](model, np.array([[1, 2, 3], [4, 25, 5]]))
    with pytest.raises(
        ValueError, match="oken.ids must be integers. Received: shape=.*, dtype=float(32|64). Convert ids"
    ):
        USES[use](model, np.ones((2, 3), "float32"))


@full("jax", "tensorflow")
def test_targets_without_weight_may_hold_any_number():
    ids = np.array([[5, 6, 7, 8, 9], [3, 4, 5, 6, 0]])
    x, y = ids[:, :-1], ids[:, 1:].copy()
    kept = np.array([[True] * 4, [True, True, True, False]])
    wrong = y.copy()
    wrong[1, 3] = -100
    for inputs, weights in (({"token_ids": x, "padding_mask": kept}, None), (x, kept.astype("float32"))):
        found, expected = (
            language().evaluate(inputs, targets, sample_weight=weights, verbose=0)[0] for targets in (wrong, y)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_model_with_an_unserializable_sampler_is_trained():
    class Second:
        temperature = 1.0

        def get_next_token(self, probabilities):
            return keras.ops.top_k(probabilities, 2)[1][:, 1]

    model = language()
    model.compile("sgd", sampler=Second())
    assert np.isfinite(model.train_on_batch(np.array([ROWS[0]])[:, :-1], np.array([ROWS[0]])[:, 1:])[0])


def test_a_classifier_accepts_any_label_of_a_row_without_weight():
    model = keras_jamba.JambaClassifier(vocab_size=19, num_classes=3, **TINY | dict(num_layers=1))
    model.compile("sgd")
    x, kept = np.array([[1, 2], [3, 4]]), np.array([1.0, 0.0])
    found = model.evaluate(x, np.array([1, -1]), sample_weight=kept, verbose=0)[0]
    np.testing.assert_allclose(found, model.evaluate(x, np.array([1, 0]), sample_weight=kept, verbose=0)[0], rtol=1e-6)


@full("jax", "tensorflow")
def test_tensors_train_as_arrays_do_and_weights_need_targets():
    ids = np.array([ROWS[0], ROWS[0][::-1]], "int32")
    losses = [language().fit(x, verbose=0).history["loss"] for x in (ids, keras.ops.convert_to_tensor(ids))]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    with pytest.raises(ValueError, match="sample_weight belongs to targets. Received: sample_weight, and no y"):
        language().fit(ids, sample_weight=np.ones(2), verbose=0)


def test_rows_too_short_to_predict_anything_are_reported():
    with pytest.raises(ValueError, match="rows of at least two tokens"):
        language().fit(np.ones((2, 1), int), verbose=0)

"""Weights of rows, tokens and classes in the training of language models, at every entry point."""

import keras
import numpy as np
import pytest
from checks import full, jitted, numpy

import keras_jamba
from keras_jamba.models._token_weights import class_weights
from keras_jamba.training.data import PackedText

B = 4
IDS = np.random.default_rng(0).integers(0, 11, (B, B + 1)).astype("int32")
# The numbers of tokens and rows are equal: row weights could be mistaken for token weights.
X, Y = IDS[:, :-1], IDS[:, 1:]
ROWS = np.array([1, 2, 0, 0.5], "float32")
TOKENS = np.random.default_rng(1).random((B, B), "float32")


def make(rate=0.0):
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(
        vocab_size=11, d_model=16, num_layers=2, mamba_ratio=1, moe_frequency=0, num_heads=2
    )
    model.compile(keras.optimizers.SGD(rate))
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def expected(model):
    """Returns a function of weights `(b, t)` that computes loss and accuracy in float64."""
    logits = numpy(jitted(model)({"token_ids": X})).astype("float64")
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = -np.take_along_axis(logits, Y[..., None], axis=-1)[..., 0]
    right = logits.argmax(axis=-1) == Y

    def weighted_means(weights):
        weights = np.broadcast_to(weights, Y.shape).astype("float64")
        return {"loss": (losses * weights).sum() / weights.sum(), "accuracy": (right * weights).sum() / weights.sum()}

    return weighted_means


def close(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(float(found[name]), value, rtol=1e-5, atol=1e-6, err_msg=name)


def logs(history):
    return {name: values[0] for name, values in history.history.items()}


def dataset(*batch):
    """Returns a Keras `PyDataset` of one batch."""

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return batch

    return Batches()


FORMS = {"(b,)": ROWS, "(b, 1)": ROWS[:, None], "(b, t)": TOKENS, "(b, t) of rows": np.tile(ROWS[:, None], (1, B))}
GIVEN = {"batch_size": B, "verbose": 0}


@full("tensorflow")
@pytest.mark.parametrize("form", FORMS)
def test_weights_of_rows_and_tokens_give_weighted_means_at_every_entry_point(model, expected, form):
    weights = FORMS[form]
    right = expected(weights if weights.ndim == 2 else weights[:, None])
    close(model.evaluate(X, Y, sample_weight=weights, return_dict=True, **GIVEN), right)
    close(logs(model.fit(X, Y, sample_weight=weights, shuffle=False, **GIVEN)), right)
    close(model.test_on_batch(X, Y, sample_weight=weights, return_dict=True), right)
    close(model.train_on_batch(X, Y, sample_weight=weights, return_dict=True), right)
    batches = dataset({"token_ids": X}, Y, weights)
    close(model.evaluate(batches, return_dict=True, verbose=0), right)
    found = logs(model.fit(batches, validation_data=(X, Y, weights), verbose=0))
    close(found, right | {f"val_{name}": value for name, value in right.items()})
    model.reset_metrics()


def test_gradients_are_those_of_the_weighted_mean():
    found = []
    for weights in (ROWS, ROWS[:, None], np.tile(ROWS[:, None], (1, B))):
        model = make(0.5)
        model.train_on_batch(X, Y, sample_weight=weights)
        found.append([numpy(v) for v in model.trainable_variables])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@full("jax", "tensorflow")
@pytest.mark.parametrize("weights", [None, ROWS, TOKENS], ids=["none", "of rows", "of tokens"])
def test_padding_of_the_inputs_has_weight_0(model, expected, weights):
    mask = np.ones(X.shape, bool)
    mask[:, -1] = False  # the last token changes no logits of earlier tokens
    right = expected(mask * (1 if weights is None else weights[:, None] if weights.ndim == 1 else weights))
    inputs = {"token_ids": X, "padding_mask": mask}
    close(model.evaluate(inputs, Y, sample_weight=weights, return_dict=True, **GIVEN), right)
    close(logs(model.fit(inputs, Y, sample_weight=weights, **GIVEN)), right)


CLASSES = {int(Y[0, 0]): 3.0, int(Y[1, 2]): 0.0, 100: 5.0}


def test_class_weights_apply_to_each_target_of_their_class(model, expected):
    of_classes = np.vectorize(lambda i: CLASSES.get(i, 1.0))(Y)
    given = GIVEN | {"class_weight": CLASSES}
    close(logs(model.fit(X, Y, **given)), expected(of_classes))
    close(logs(model.fit(X, Y, sample_weight=ROWS, **given)), expected(of_classes * ROWS[:, None]))
    close(model.train_on_batch(X, Y, class_weight=CLASSES, return_dict=True), expected(of_classes))
    found = model.train_on_batch(X, Y, sample_weight=TOKENS, class_weight=CLASSES, return_dict=True)
    close(found, expected(of_classes * TOKENS))
    # `fit` pads rows of ids, and the padding keeps weight 0.
    close(logs(model.fit(list(IDS), **given)), expected(of_classes))
    ragged = [IDS[0], IDS[1, :3]]
    _, targets, padding = model._examples(ragged, None, None, None)
    found = class_weights(CLASSES, None, targets, padding)
    np.testing.assert_array_equal(found, np.vectorize(lambda i: CLASSES.get(i, 1.0))(targets) * padding)
    assert (found[1, 2:] == 0).all()
    model.reset_metrics()


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m, **g: m.evaluate(X, Y, sample_weight=TOKENS[:, :3], **g),
            r"\(4, 4\), or one number per row.*\(4, 3\)",
        ),
        (
            lambda m, **g: m.fit(X, Y, sample_weight=TOKENS[..., None], **g),
            r"Received: sample_weight.shape=\(4, 4, 1\)",
        ),
        (lambda m, **g: m.train_on_batch(X, Y, sample_weight=TOKENS[:2]), r"sample_weight.shape=\(2, 4\)"),
        (lambda m, **g: m.test_on_batch(X, Y, sample_weight=np.float32(2)), r"sample_weight.shape=\(\)"),
        (lambda m, **g: m.fit(X, Y, class_weight=[1.0] * 11, **g), "must be a dict of token ids and numbers"),
        (lambda m, **g: m.fit(X, Y, class_weight={"a": 1.0}, **g), "must be a dict of token ids and numbers"),
        (
            lambda m, **g: m.fit(PackedText([IDS[0]], length=3, batch_size=1), class_weight=CLASSES, verbose=0),
            "class_weight gives weights to an array of targets .*PackedText.* Let a dataset yield sample_weight",
        ),
    ],
)
def test_invalid_weights_are_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, **GIVEN)


@full("jax", "tensorflow")
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64"])
def test_ids_of_every_integer_type_train_alike(model, expected, dtype):
    close(model.evaluate(X, Y.astype(dtype), return_dict=True, **GIVEN), expected(1.0))
    close(logs(model.fit(IDS.astype(dtype), **GIVEN)), expected(1.0))
    close(logs(model.fit({"token_ids": IDS.astype(dtype)}, **GIVEN)), expected(1.0))
    close(logs(model.fit(list(IDS.astype(dtype)), **GIVEN)), expected(1.0))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the dataset is from TensorFlow")
def test_tensorflow_datasets_carry_row_weights(model, expected):
    import tensorflow as tf

    right = expected(ROWS[:, None])
    for drop_remainder in (True, False):  # with and without a static batch size
        batches = tf.data.Dataset.from_tensor_slices((X, Y, ROWS)).batch(B, drop_remainder)
        close(model.evaluate(batches, return_dict=True, verbose=0), right)
        close(logs(model.fit(batches, shuffle=False, verbose=0)), right)
    with pytest.raises(ValueError, match="Let a dataset yield sample_weight"):
        model.fit(batches, class_weight=CLASSES, shuffle=False, verbose=0)

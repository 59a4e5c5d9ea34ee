"""Losses and labels that do not fit logits are refused; in compiled code a wrong label makes the loss NaN."""

import keras
import numpy as np
import pytest
from checks import full, once

import keras_jamba
from keras_jamba.models._label_checks import check_labels

TINY = dict(num_classes=3, image_shape=(4, 4, 1), d_model=4, num_layers=1, mamba_ratio=None, d_state=2, downsample=2)
TINY |= dict(stem="patchify", moe_frequency=0)
TEXT = dict(vocab_size=11, d_model=4, num_layers=1, mamba_ratio=None, d_state=2, moe_frequency=0)
IMAGES = np.random.default_rng(0).random((6, 4, 4, 1), "float32")
LABELS = np.array([0, 1, 2, 0, 1, 2])
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
DENSE = keras.losses.CategoricalCrossentropy(from_logits=True)


def model_of(loss=SPARSE, num_classes=3, **options):
    keras.utils.set_random_seed(0)
    model = keras_jamba.DHCJamba(**TINY | dict(num_classes=num_classes))
    model.compile("sgd", loss, **options)
    return model


OF_PROBABILITIES = {
    "sparse_categorical_crossentropy": "SparseCategoricalCrossentropy",
    "SparseCategoricalCrossentropy": "SparseCategoricalCrossentropy",
    "crossentropy": "SparseCategoricalCrossentropy",
    keras.losses.sparse_categorical_crossentropy: "SparseCategoricalCrossentropy",
    keras.losses.CategoricalCrossentropy(): "CategoricalCrossentropy",
    "categorical_focal_crossentropy": "CategoricalFocalCrossentropy",
    "binary_crossentropy": "BinaryCrossentropy",
    keras.losses.BinaryFocalCrossentropy(): "BinaryFocalCrossentropy",
    "kl_divergence": "CategoricalCrossentropy",
    keras.losses.KLDivergence(): "CategoricalCrossentropy",
}


@once
@pytest.mark.parametrize("loss", OF_PROBABILITIES, ids=str)
def test_a_loss_of_probabilities_is_refused_by_compile(loss):
    message = rf"must take logits.*Received.*from_logits.*keras.losses.{OF_PROBABILITIES[loss]}\(from_logits=True\)"
    for wrong in (loss, [loss], {"head": loss}):
        with pytest.raises(ValueError, match=message):
            model_of(wrong)


@once
def test_models_of_text_refuse_a_loss_of_probabilities_too():
    for model in (keras_jamba.JambaClassifier(**TEXT), keras_jamba.JambaCausalLM(**TEXT)):
        with pytest.raises(ValueError, match="must take logits.*Received.*from_logits=True"):
            model.compile("adam", "sparse_categorical_crossentropy")
        model.compile()


@once
@pytest.mark.parametrize("metric", ["sparse_categorical_crossentropy", keras.metrics.AUC(), "kl_divergence"], ids=str)
def test_a_metric_of_probabilities_is_refused_by_compile(metric):
    for argument in ("metrics", "weighted_metrics"):
        with pytest.raises(ValueError, match=rf"{argument} must take logits.*Received.*from_logits=True"):
            model_of(**{argument: ["accuracy", metric]})


@once
@pytest.mark.parametrize("loss", [SPARSE, DENSE, "mse", keras.losses.Hinge(), lambda y, logits: logits[:, 0], None])
def test_other_losses_and_metrics_are_compiled(loss):
    model_of(loss, metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)])


WRONG = {
    "too large": (SPARSE, np.array([0, 1, 3, 0, 1, 2]), r"0 to num_classes - 1 = 2. Received: 3 at \[2\]. Build"),
    "negative": (SPARSE, np.array([0, 1, -1, 0, 1, 2]), r"Received: -1 at \[2\]"),
    "torch's ignored": (SPARSE, np.array([0, 1, -100, 0, 1, 2]), r"Received: -100 at \[2\]"),
    "from 1": (SPARSE, LABELS + 1, "Received: 3.*Count classes from 0"),
    "fractions": (SPARSE, LABELS + 0.5, "integers from 0.*Received: 0.5"),
    "NaN": (SPARSE, LABELS + np.nan, "integers from 0.*Received: nan"),
    "text": (SPARSE, np.array(list("abcabc")), "integers from 0.*Received: labels of dtype.*Convert"),
    "one-hot": (SPARSE, np.eye(3)[LABELS], r"of shape \(6,\). Received.*\(6, 3\).*CategoricalCrossentropy.*argmax"),
    "too few": (SPARSE, LABELS[:4], r"of shape \(6,\). Received.*\(4,\)"),
    "integers": (DENSE, LABELS, r"the shape \(6, 3\).*Received.*\(6,\).*SparseCategoricalCrossentropy.*to_categorical"),
    "other classes": (DENSE, np.eye(4)[LABELS], r"the shape \(6, 3\).*Received.*\(6, 4\).*one number per class"),
    "integers of mse": ("mse", LABELS, r"this loss, mse.*the shape \(6, 3\).*Received.*\(6,\)"),
}


@once
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_labels_are_reported(wrong):
    loss, labels, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        check_labels(labels, loss, (6, 3))


@once
@pytest.mark.parametrize(
    "loss, labels",
    [
        (SPARSE, LABELS.astype("uint8")),
        (SPARSE, LABELS[:, None].astype("float32")),
        (SPARSE, LABELS.tolist()),
        ([SPARSE], [LABELS]),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1), LABELS - 1),
        (DENSE, np.eye(3)[LABELS]),
        (lambda y, logits: 0.0, LABELS + 100),
        (None, LABELS + 100),
    ],
)
def test_labels_that_keras_accepts_are_accepted(loss, labels):
    check_labels(labels, loss, (6, 3))


@full("jax")
@pytest.mark.parametrize("loop", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_every_loop_refuses_wrong_labels(loop):
    model = model_of()
    silent = {} if loop.endswith("batch") else {"verbose": 0}
    silent |= {"shuffle": False} if loop == "fit" else {}
    for name in ("too large", "torch's ignored", "fractions", "one-hot"):
        with pytest.raises(ValueError, match=WRONG[name][2]):
            getattr(model, loop)(IMAGES, WRONG[name][1], **silent)
    getattr(model, loop)(IMAGES, LABELS, **silent)


@full("jax", "tensorflow")
def test_wrong_labels_in_later_batches_make_the_loss_nan():
    labels = np.array([0, 1, 2, 0, 1, 2])
    for wrong in (3, -1, -100, 0.5):
        model = model_of()
        before = model.get_weights()
        later = np.array([0, 1, 2, 0, 1, wrong])
        assert np.isnan(model.fit(IMAGES, later, batch_size=3, shuffle=False, verbose=0).history["loss"][0])
        # The step with the wrong label changes no weight, and all weights stay finite.
        assert all(np.isfinite(w).all() for w in model.get_weights())
        assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))
    assert np.isfinite(model_of().fit(IMAGES, labels, batch_size=3, verbose=0).history["loss"]).all()


@full("jax")
def test_ignored_classes_and_zero_weights_do_not_make_the_loss_nan():
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    labels = np.array([0, 1, 2, 0, 1, -1])
    model = model_of(ignoring)
    kept = np.array([1, 1, 1, 1, 1, 0], "float32")
    expected = model_of().evaluate(IMAGES[:5], labels[:5], verbose=0)
    np.testing.assert_allclose(model.evaluate(IMAGES, labels, verbose=0), expected, rtol=1e-5)
    valid = np.array([0, 1, 2, 0, 1, 0])
    weighted = model_of().evaluate(IMAGES, valid, sample_weight=kept, verbose=0)
    np.testing.assert_allclose(weighted, expected * 5 / 6, rtol=1e-5)
    for label_rank, weight_rank in ((1, 1), (1, 2), (2, 1), (2, 2)):
        given = labels.reshape((6, 1)[:label_rank]), kept.reshape((6, 1)[:weight_rank])
        wrong = model_of().evaluate(IMAGES, given[0], sample_weight=given[1], verbose=0)
        np.testing.assert_allclose(wrong, weighted, rtol=1e-5)


@once
@pytest.mark.parametrize(
    "metric", ["accuracy", "binary_accuracy", keras.metrics.BinaryAccuracy(), keras.metrics.Recall()], ids=str
)
def test_a_metric_with_a_probability_threshold_is_refused_for_one_logit(metric):
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    with pytest.raises(ValueError, match=r"threshold 0 of logits.*Received: .*threshold=0\.0"):
        model_of(loss, num_classes=1, metrics=[metric])
    right = [keras.metrics.BinaryAccuracy(threshold=0.0), keras.metrics.Recall(thresholds=0.0)]
    model_of(loss, num_classes=1, metrics=right).evaluate(IMAGES, LABELS > 0, verbose=0)


@once
@pytest.mark.parametrize("loss", [keras.losses.Dice(), keras.losses.Tversky(), "dice"], ids=str)
def test_losses_of_probabilities_without_from_logits_are_refused(loss):
    with pytest.raises(ValueError, match="loss must take logits.*Received"):
        model_of(loss)


def test_images_without_labels_are_refused():
    with pytest.raises(ValueError, match="need labels.*Received: y=None. Pass fit"):
        model_of().fit(IMAGES, verbose=0)


def test_a_loaded_model_keeps_its_compilation(tmp_path):
    model = model_of(metrics=["accuracy"])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(IMAGES, LABELS, verbose=0) == model.evaluate(IMAGES, LABELS, verbose=0)

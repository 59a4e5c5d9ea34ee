"""Steps whose loss computes logits in chunks give the numbers of steps with the logits of all tokens."""

import keras
import numpy as np
import pytest
from checks import full, numpy, once, torch_operations

import keras_jamba
from keras_jamba.layers._token_embedding import TokenEmbedding
from keras_jamba.models import _chunked_loss
from keras_jamba.ops import cross_entropy

BACKEND = keras.backend.backend()
VOCABULARY, ROWS, TOKENS = 50, 3, 7
TINY = dict(vocab_size=VOCABULARY, d_model=8, num_layers=1, mamba_ratio=1)


@pytest.fixture
def chunks(monkeypatch):
    """Makes all steps that can use chunks use chunks of 5 tokens, and returns a list with an item per use."""
    uses, own = [], TokenEmbedding.cross_entropy

    def counted(layer, features, targets):
        uses.append(features.shape)
        return own(layer, features, targets)

    monkeypatch.setattr(TokenEmbedding, "cross_entropy", counted)
    for module in (cross_entropy, _chunked_loss):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4 * VOCABULARY * 5)
    monkeypatch.setattr(cross_entropy, "_FEWEST", 1)
    monkeypatch.setattr(cross_entropy, "_OF_UNKNOWN", 5)
    monkeypatch.setattr(_chunked_loss, "_FEWEST_CLASSES", 1)
    return uses


def all_logits(monkeypatch):
    monkeypatch.setattr(_chunked_loss, "_has_many_logits", lambda *_: False)


def language(adapters=False, quantization=None, kind=keras_jamba.JambaCausalLM, given=(), **options):
    keras.utils.set_random_seed(0)
    model = kind(**TINY | options)
    if quantization:
        model.quantize(quantization)
    if adapters:
        model.enable_lora(2)
    model.compile(**{"optimizer": keras.optimizers.SGD(1.0)} | dict(given))
    return model


def batch(weighted=False):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (ROWS, TOKENS + 1)).astype("int32")
    # Some predictions must be right.
    tokens[:, 4:] = 3
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.arange(TOKENS) < [[7], [5], [7]]}
    return inputs, tokens[:, 1:], rng.random((ROWS, TOKENS)).astype("float32") if weighted else None


def results(model, data=None):
    """Returns the logs of evaluation, training and evaluation, and the changes of the weights."""
    x, y, weights = data or batch()
    before = [numpy(v.value) for v in model.trainable_variables]
    logs = [
        model.test_on_batch(x, y, weights, return_dict=True),
        model.train_on_batch(x, y, weights, return_dict=True),
        model.evaluate(x, y, sample_weight=weights, batch_size=2, verbose=0, return_dict=True),
    ]
    changes = [numpy(v.value) - b for v, b in zip(model.trainable_variables, before, strict=True)]
    return [{name: float(value) for name, value in each.items()} for each in logs], changes


def assert_equal_results(found, expected, relative=1e-5):
    for actual, value in zip(found[0], expected[0], strict=True):
        assert actual == pytest.approx(value, rel=relative, abs=1e-6, nan_ok=True)
    for actual, value in zip(found[1], expected[1], strict=True):
        # Differences of weights up to 3 have their rounding.
        assert np.abs(actual - value).max() <= relative * np.abs(value).max() + 3e-7


CASES = {
    "default": {},
    "tied, with weights": dict(tie_embeddings=True),
    "experts": dict(num_experts=3, d_ff=16, moe_frequency=1),
    "int8 with adapters": dict(quantization="int8", adapters=True),
    "int4 with adapters": dict(quantization="int4", adapters=True),
    "adapters": dict(adapters=True),
    "no metrics": dict(given=dict(weighted_metrics=None)),
    "named metrics": dict(given=dict(metrics=["accuracy"], weighted_metrics=[])),
    "sum and loss weight": dict(
        given=dict(loss_weights=0.5, loss=keras_jamba.models._loss.TokenCrossentropy(from_logits=True, reduction="sum"))
    ),
}
MORE = [name for name in CASES if name not in ("default", "tied, with weights")]


def check(options, monkeypatch, chunks, relative=1e-5):
    data = batch(weighted="tie_embeddings" in options)
    found = results(language(**options), data)
    assert chunks
    chunks.clear()
    all_logits(monkeypatch)
    assert_equal_results(found, results(language(**options), data), relative)
    assert not chunks


@pytest.mark.parametrize("name", ["default", "tied, with weights"])
def test_losses_accuracies_and_gradients_are_those_of_all_logits(name, monkeypatch, chunks):
    check(CASES[name], monkeypatch, chunks)


@full("jax", "tensorflow")
@pytest.mark.parametrize("name", MORE)
def test_losses_accuracies_and_gradients_are_those_of_all_logits_in_more_cases(name, monkeypatch, chunks):
    check(CASES[name], monkeypatch, chunks)


@full("jax", "tensorflow")
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_agrees_within_its_rounding(policy, monkeypatch, chunks):
    check(dict(dtype=policy), monkeypatch, chunks, relative=3e-2)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow needs jit_compile=True for XLA")
@full("tensorflow")
@pytest.mark.parametrize("way", [dict(jit_compile=True), dict(run_eagerly=True)])
def test_tensorflow_under_xla_and_eagerly(way, monkeypatch, chunks):
    check(dict(given=way), monkeypatch, chunks)


@full("jax", "tensorflow")
def test_accumulated_gradients_and_fit_agree(monkeypatch, chunks):
    def trained():
        model = language(given=dict(optimizer=keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)))
        x, y, _ = batch()
        history = model.fit(x, y, batch_size=2, epochs=2, shuffle=False, validation_data=(x, y), verbose=0).history
        return [{k: v[-1] for k, v in history.items()}], [numpy(v.value) for v in model.trainable_variables]

    found = trained()
    assert chunks
    all_logits(monkeypatch)
    assert_equal_results(found, trained())


@full("jax", "tensorflow")
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_ids_that_are_no_tokens_need_weight_zero(weight, monkeypatch, chunks):
    def trained():
        model = language()
        x, y, _ = batch()
        y, weights = y.copy(), np.ones(y.shape, "float32")
        y[0, 0], weights[0, 0] = -100, weight
        # `train_on_batch` refuses such a batch, and later batches of `fit` reach the step.
        monkeypatch.setattr(model, "check_batch", lambda *_: None)
        return results(model, (x, y, weights))

    found = trained()
    assert chunks
    assert np.isnan(found[0][1]["loss"]) == (weight != 0)
    all_logits(monkeypatch)
    assert_equal_results(found, trained())


@once
def test_targets_with_a_last_axis_take_the_logits_of_all_tokens(monkeypatch, chunks):
    def trained():
        x, y, _ = batch()
        return results(language(), (x, y[..., None], None))

    found = trained()
    assert not chunks
    all_logits(monkeypatch)
    assert_equal_results(found, trained())


class OwnCall(keras_jamba.JambaCausalLM):
    def call(self, inputs, **options):
        return super().call(inputs, **options) * 2


class OwnStep(keras_jamba.JambaCausalLM):
    def train_step(self, data):
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        assert self(x).shape[-1] == VOCABULARY
        return super().train_step(data)


class OwnLogits(keras_jamba.JambaCausalLM):
    def logits(self, features):
        return super().logits(features) + 1


class OwnMetrics(keras_jamba.JambaCausalLM):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        assert y_pred.shape[-1] == VOCABULARY
        return super().compute_metrics(x, y, y_pred, sample_weight)


TokenCrossentropy = keras_jamba.models._loss.TokenCrossentropy
UNSUITABLE = {
    "own call": dict(kind=OwnCall),
    "own step": dict(kind=OwnStep),
    "own logits": dict(kind=OwnLogits),
    "own metrics": dict(kind=OwnMetrics),
    "another loss": dict(given=dict(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))),
    "ignore_class": dict(given=dict(loss=TokenCrossentropy(from_logits=True, ignore_class=3))),
    "another metric": dict(
        given=dict(weighted_metrics=[keras.metrics.SparseTopKCategoricalAccuracy(name="top"), "accuracy"])
    ),
}


@once
@pytest.mark.parametrize("name", UNSUITABLE)
def test_other_losses_metrics_and_methods_get_logits(name, chunks):
    logs, _ = results(language(**UNSUITABLE[name]))
    assert not chunks
    assert np.isfinite([value for each in logs for value in each.values()]).all()


@once
def test_hooks_and_replaced_methods_get_logits(chunks):
    model, seen = language(), []
    handle = model.register_forward_hook(lambda module, given, output: seen.append(output.shape))
    results(model)
    assert not chunks
    assert (ROWS, TOKENS, VOCABULARY) in seen
    handle.remove()
    model.token_embedding.call = model.token_embedding.call
    results(model)
    assert not chunks


@once
def test_calls_prediction_and_generation_get_logits(chunks):
    model = language()
    x, y, _ = batch()
    model.fit(x, y, verbose=0)
    assert chunks
    chunks.clear()
    assert model(x).shape == model.predict(x, verbose=0).shape == (ROWS, TOKENS, VOCABULARY)
    assert len(model.generate([[1, 2, 3]], max_new_tokens=2)[0]) == 5
    assert not chunks


@once
def test_a_training_step_holds_the_logits_of_one_chunk_at_most(chunks):
    model = language()
    x, y, _ = batch()
    model.train_on_batch(x, y)
    shapes = [shape for _, shape in torch_operations(lambda: model.train_on_batch(x, y)) if shape]
    most = max(np.prod(shape) for shape in shapes if VOCABULARY in shape and 8 not in shape)
    assert most == 5 * VOCABULARY


@once
def test_few_logits_are_computed_at_once(monkeypatch):
    monkeypatch.setattr(TokenEmbedding, "cross_entropy", lambda *_: pytest.fail("chunks were used"))
    results(language())

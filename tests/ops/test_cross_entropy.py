"""Cross-entropy in chunks equals that of all logits, and no tensor holds all of them."""

import keras
import numpy as np
import pytest
from checks import close, gradients, numpy, torch_operations
from keras import ops

from keras_jamba.ops import linear_cross_entropy
from keras_jamba.ops.quantization import QuantizedTensor, dequantized, quantized

BACKEND = keras.backend.backend()
ROWS, WIDTH, CLASSES = 37, 8, 50


def arrays(rows=ROWS):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((rows, WIDTH)).astype("float32")
    kernel = rng.standard_normal((WIDTH, CLASSES)).astype("float32")
    return features, kernel, rng.integers(0, CLASSES, rows).astype("int32"), rng.random(rows).astype("float32")


def reference(features, kernel, targets, weights):
    """Returns losses, predicted classes, and the gradients of the weighted sum, in float64."""
    features, kernel = features.astype("float64"), kernel.astype("float64")
    logits = features @ kernel
    logs = np.log(np.exp(logits).sum(axis=-1))
    grads = (np.exp(logits - logs[:, None]) - np.eye(CLASSES)[targets]) * weights[:, None]
    losses = logs - logits[np.arange(len(targets)), targets]
    return losses, logits.argmax(axis=-1), grads @ kernel.T, features.T @ grads


def weighted(targets, weights, **options):
    weights = ops.convert_to_tensor(weights)
    return lambda x, kernel: ops.sum(linear_cross_entropy(x, kernel, targets, **options)[0] * weights)


def relative(actual, expected):
    return np.abs(ops.convert_to_numpy(actual) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("chunk_size", [16, 37, None])
@pytest.mark.parametrize("transposed", [False, True])
def test_losses_and_gradients_equal_those_of_all_logits(transposed, chunk_size):
    features, kernel, targets, weights = arrays()
    given, options = kernel.T.copy() if transposed else kernel, dict(transposed=transposed, chunk_size=chunk_size)
    losses, predicted, of_features, of_kernel = reference(features, kernel, targets, weights)
    found, classes = linear_cross_entropy(features, given, targets, **options)
    assert relative(found, losses) < 1e-6
    assert keras.backend.standardize_dtype(classes.dtype) == "int32"
    np.testing.assert_array_equal(numpy(classes), predicted)
    actual = gradients(weighted(targets, weights, **options), [features, given])
    assert relative(actual[0], of_features) < 1e-6
    assert relative(actual[1].T if transposed else actual[1], of_kernel) < 1e-6


def test_results_have_the_shape_of_the_targets():
    features, kernel, targets, weights = arrays(36)
    losses, classes = linear_cross_entropy(features.reshape(3, 12, -1), kernel, targets.reshape(3, 12), chunk_size=5)
    expected = reference(features, kernel, targets, weights)
    assert relative(losses, expected[0].reshape(3, 12)) < 1e-6
    np.testing.assert_array_equal(numpy(classes), expected[1].reshape(3, 12))


def test_no_tokens_give_no_losses_and_a_gradient_of_zero():
    features, kernel, targets, weights = (x[:0] if len(x) == ROWS else x for x in arrays())
    losses, predicted = linear_cross_entropy(features, kernel, targets)
    assert losses.shape == predicted.shape == (0,)
    found = gradients(weighted(targets, weights), [features, kernel])
    assert found[0].shape == features.shape
    assert not np.any(found[1])


def test_a_frozen_kernel_gets_no_gradient():
    features, kernel, targets, weights = arrays()
    expected = reference(features, kernel, targets, weights)
    found = gradients(weighted(targets, weights, chunk_size=16, kernel_gradient=False), [features, kernel])
    assert relative(found[0], expected[2]) < 1e-6
    assert not np.any(found[1])


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_kernel_gives_the_losses_of_its_matrix(mode):
    features, kernel, targets, weights = arrays()
    parts = quantized(kernel, mode)
    stored = QuantizedTensor(*(ops.convert_to_tensor(x) for x in parts.values()))
    expected = reference(features, numpy(dequantized(stored, "float32")), targets, weights)
    assert relative(linear_cross_entropy(features, stored, targets, chunk_size=16)[0], expected[0]) < 1e-5
    loss = weighted(targets, weights, chunk_size=16)
    assert relative(gradients(lambda x: loss(x, stored), [features])[0], expected[2]) < 1e-5


def test_bfloat16_features_keep_float32_losses_and_their_own_dtype_in_gradients():
    features, kernel, targets, weights = arrays()
    features, kernel = (numpy(ops.cast(ops.cast(x, "bfloat16"), "float32")) for x in (features, kernel))
    expected = reference(features, kernel, targets, weights)
    loss = weighted(targets, weights, chunk_size=16)
    found = linear_cross_entropy(ops.cast(features, "bfloat16"), kernel, targets, chunk_size=16)[0]
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    close(found, expected[0], relative=1e-2, absolute=1e-2)
    actual = gradients(lambda x, kernel: loss(ops.cast(x, "bfloat16"), kernel), [features, kernel])
    assert relative(actual[0], expected[2]) < 1e-2
    assert relative(actual[1], expected[3]) < 1e-2


def test_a_target_outside_of_the_classes_gives_nan_for_its_token_alone():
    features, kernel, targets, weights = arrays()
    losses, *_ = reference(features, kernel, targets, weights)
    targets[[3, 20]] = -1, CLASSES
    found = numpy(linear_cross_entropy(features, kernel, targets, chunk_size=16)[0])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found)), [3, 20])
    kept = np.isfinite(found)
    assert relative(found[kept], losses[kept]) < 1e-6


def test_no_tensor_holds_all_logits():
    features, kernel, targets, weights = arrays()
    loss = weighted(targets, weights, chunk_size=8)
    if BACKEND == "torch":
        shapes = [shape for _, shape in torch_operations(lambda: gradients(loss, [features, kernel])) if shape]
    elif BACKEND == "jax":
        import re

        import jax

        text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(features, kernel))
        shapes = [tuple(map(int, found.split(","))) for found in re.findall(r"\[(\d+(?:,\d+)*)\]", text)]
    else:
        pytest.skip("TensorFlow's compiled loops show no shapes")
    assert (8, CLASSES) in map(tuple, shapes)
    assert max(np.prod(shape) for shape in shapes) <= max(8 * CLASSES, (ROWS + 3) * WIDTH)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow traces unknown shapes")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_graph_may_not_know_the_number_of_tokens(jit_compile, monkeypatch):
    import tensorflow as tf

    from keras_jamba.ops import cross_entropy

    monkeypatch.setattr(cross_entropy, "_OF_UNKNOWN", 16)
    features, kernel, targets, weights = arrays()
    expected = reference(features, kernel, targets, weights)

    @tf.function(
        jit_compile=jit_compile,
        input_signature=[
            tf.TensorSpec((None, WIDTH)),
            tf.TensorSpec((WIDTH, CLASSES)),
            *(tf.TensorSpec((None,), x) for x in ("int32", "float32")),
        ],
    )
    def step(features, kernel, targets, weights):
        with tf.GradientTape() as tape:
            tape.watch([features, kernel])
            losses, predicted = linear_cross_entropy(features, kernel, targets)
            total = tf.reduce_sum(losses * weights)
        return losses, predicted, *tape.gradient(total, [features, kernel])

    found = step(*map(tf.constant, (features, kernel, targets, weights)))
    for actual, value in zip(found, expected, strict=True):
        assert relative(actual, value) < 1e-6


@pytest.mark.skipif(BACKEND != "torch", reason="JAX and TensorFlow differentiate the backward pass, or raise their own")
def test_second_derivatives_raise_an_error():
    import torch

    features, kernel, targets, weights = arrays()
    x = torch.tensor(features, requires_grad=True)
    (first,) = torch.autograd.grad(weighted(targets, weights)(x, torch.tensor(kernel)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        first.sum().backward()


def test_unsuitable_arguments_raise_errors():
    features, kernel, targets, _ = arrays()
    with pytest.raises(ValueError, match=r"features must be .* Received: .* Pass one target per token"):
        linear_cross_entropy(features, kernel.T, targets)
    with pytest.raises(ValueError, match=r"features must be"):
        linear_cross_entropy(features, kernel, targets[1:])
    with pytest.raises(ValueError, match=r"chunk_size must be an integer of at least 1"):
        linear_cross_entropy(features, kernel, targets, chunk_size=0)

"""Batch norm: the formula, inference statistics after few batches, frozen layers, and files of Keras' layer."""

import keras
import numpy as np
import pytest
from checks import close, full, gradients, numpy, torch_operations
from keras import ops

import keras_jamba
from keras_jamba.layers import SpatialEncoder
from keras_jamba.layers._batch_norm import BatchNormalization
from keras_jamba.layers.vision import _convolution_encoder

EPSILON, MOMENTUM = 1e-3, 0.8


def batches(count, channels=3):
    """Returns batches with different means and a variance of about .005, far from 1."""
    rng = np.random.default_rng(0)
    return [rng.normal(0.1 * i + 0.3, 0.07, (4, 5, 5, channels)).astype("float32") for i in range(count)]


def statistics(x):
    x = x.astype("float64")
    return x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))


def normalized(x, mean, variance, gamma=1.0, beta=0.0):
    return (x - mean) / np.sqrt(variance + EPSILON) * gamma + beta


def built(**given):
    layer = BatchNormalization(**given)
    layer.build((None, None, None, 3))
    return layer


def moving(layer):
    return numpy(layer.moving_mean.value), numpy(layer.moving_variance.value)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_moving_statistics_start_with_the_first_batch_then_average(policy):
    layer = built(dtype=policy)
    tolerance = dict(absolute=1e-5) if policy == "float32" else dict(relative=0.02, absolute=0.02)
    expected = None
    for x in batches(4):
        x = ops.cast(x, layer.compute_dtype)
        seen = numpy(ops.cast(x, "float32"))
        y = layer(x, training=True)
        close(ops.cast(y, "float32"), normalized(seen, *statistics(seen)), **tolerance)
        new = np.stack(statistics(seen))
        expected = new if expected is None else MOMENTUM * expected + (1 - MOMENTUM) * new
        for variable, value in zip((layer.moving_mean, layer.moving_variance), expected, strict=True):
            assert keras.backend.standardize_dtype(variable.dtype) == "float32"
            close(variable, value, absolute=1e-6)
    close(ops.cast(layer(x), "float32"), normalized(seen, *expected), **tolerance)


def test_inference_after_one_batch_equals_the_training_outputs():
    layer, (x,) = built(), batches(1)
    close(layer(x), x / np.sqrt(1 + EPSILON), absolute=1e-6)  # before any batch: mean 0 and variance 1
    y = numpy(layer(x, training=True))
    close(layer(x, training=False), y, absolute=1e-5)


def test_gradients_equal_the_formula():
    layer, (x,) = built(), batches(1)
    rng = np.random.default_rng(1)
    gamma, beta, weight = rng.random(3), rng.random(3), rng.standard_normal(x.shape)
    state = [ops.convert_to_tensor(v) for v in moving(layer)]

    def loss(x, gamma, beta):
        y, _ = layer.stateless_call([gamma, beta], state, x, training=True)
        return ops.sum(y * ops.cast(weight, "float32"))

    found = gradients(loss, [x, gamma.astype("float32"), beta.astype("float32")])
    mean, variance = statistics(x)
    hat, scale = normalized(x, mean, variance), gamma / np.sqrt(variance + EPSILON)
    axes = (0, 1, 2)
    inner = weight - weight.mean(axes) - hat * (weight * hat).mean(axes)
    for a, e in zip(found, (scale * inner, (weight * hat).sum(axes), weight.sum(axes)), strict=True):
        close(a, e, relative=1e-3, absolute=2e-3)


def test_a_frozen_layer_keeps_its_statistics_and_uses_them_in_training():
    layer, (first, second) = built(), batches(2)
    layer(first, training=True)
    layer.trainable = False
    close(layer(second, training=True), normalized(second, *statistics(first)), absolute=1e-4)
    for found, expected in zip(moving(layer), statistics(first), strict=True):
        close(found, expected, absolute=1e-6)


def test_an_untrained_frozen_layer_keeps_its_initial_statistics():
    encoder = SpatialEncoder(8, downsample=2)
    encoder.build((None, 8, 8, 1))
    encoder.trainable = False
    encoder(np.random.default_rng(0).random((2, 8, 8, 1), "float32"), training=True)
    for norm in encoder.norms:
        np.testing.assert_array_equal(np.stack(moving(norm)), [np.zeros(norm.beta.shape), np.ones(norm.beta.shape)])


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="JAX and TensorFlow compile complete steps")
def test_a_step_copies_no_scalar_to_the_device():
    layer, (x,) = built(), batches(1)
    x = ops.convert_to_tensor(x)
    layer(x, training=True)
    names = {name for name, _ in torch_operations(lambda: layer(x, training=True))}
    assert "aten::copy_" in names  # the statistics were assigned
    assert not names & {"aten::lift_fresh", "aten::_local_scalar_dense"}


def tiny(**changes):
    sizes = dict(d_model=16, num_layers=1, mamba_ratio=None, moe_frequency=0, num_classes=3, downsample=2)
    return keras_jamba.DHCJamba(image_shape=(8, 8, 1), **sizes | changes)


def three_classes():
    """Returns 96 images and their labels; each of the three classes is bright in other columns."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    images = 0.4 * rng.random((96, 8, 8, 1), "float32")
    for label in range(3):
        images[labels == label, :, 2 * label + 1 : 2 * label + 3] += 0.3
    return images, labels


def compiled(model, **given):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"], **given)
    return model


def test_keras_batch_norm_weights_load_and_continue_their_average(monkeypatch, tmp_path):
    images, labels = three_classes()
    with monkeypatch.context() as patch:
        patch.setattr(_convolution_encoder, "BatchNormalization", keras.layers.BatchNormalization)
        old = tiny()
    old.encoder(images, training=True)
    old.save(tmp_path / "old.keras")
    old.save_to_preset(tmp_path / "old")
    expected = old.predict(images, verbose=0)
    assert [v.path for v in old.weights] == [v.path for v in tiny().weights]
    preset = keras_jamba.DHCJamba.from_preset(tmp_path / "old")
    for loaded in (keras.models.load_model(tmp_path / "old.keras"), preset):
        assert all(type(norm) is BatchNormalization for norm in loaded.encoder.norms)
        close(loaded.predict(images, verbose=0), expected, absolute=1e-5)
    norm = preset.encoder.norms[0]
    before, batch = np.stack(moving(norm)), np.stack(statistics(numpy(preset.encoder.convolutions[0](images))))
    preset.encoder(images, training=True)
    close(np.stack(moving(norm)), MOMENTUM * before + (1 - MOMENTUM) * batch, absolute=1e-6)


def calibrate(encoder, images):
    """Assigns the exact statistics of all images to the norms."""
    x = ops.convert_to_tensor(images)
    for convolution, norm in zip(encoder.convolutions, encoder.norms, strict=True):
        x = convolution(x)
        for variable, value in zip((norm.moving_mean, norm.moving_variance), statistics(numpy(x)), strict=True):
            variable.assign(value.astype("float32"))
        x = ops.silu(norm(x, training=False))


@full("jax", "tensorflow")
def test_three_epochs_evaluate_like_calibrated_statistics():
    images, labels = three_classes()
    # TensorFlow uses XLA only on request; PyTorch's compiler would take minutes.
    model = compiled(tiny(), jit_compile=keras.backend.backend() != "torch")
    model.optimizer.build(model.trainable_variables)
    start = [np.array(numpy(v.value)) for v in model.optimizer.variables]
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        model.set_weights(tiny().get_weights())
        for variable, value in zip(model.optimizer.variables, start, strict=True):
            variable.assign(value)
        history = model.fit(images, labels, batch_size=16, epochs=3, verbose=0).history
        evaluated = model.evaluate(images, labels, batch_size=96, verbose=0, return_dict=True)["accuracy"]
        calibrate(model.encoder, images)
        calibrated = model.evaluate(images, labels, batch_size=96, verbose=0, return_dict=True)["accuracy"]
        assert evaluated > history["accuracy"][-1] - 0.1 and abs(evaluated - calibrated) < 0.1, (
            seed,
            history,
            evaluated,
        )
        assert calibrated > 0.8

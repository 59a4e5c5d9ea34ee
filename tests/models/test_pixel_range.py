"""Every entry of a model refuses images of a wrong shape, dtype or range, and scales its declared range."""

import json
import logging

import keras
import numpy as np
import pytest
from checks import close, full, jitted, numpy, once

import keras_jamba
from keras_jamba import _backend, visualize
from keras_jamba.models._images import checked_image_shape, checked_pixel_range

TINY = dict(num_classes=3, d_model=4, num_layers=1, mamba_ratio=None, d_state=2, moe_frequency=0, downsample=2)
TINY |= dict(stem="patchify")
BYTES = np.random.default_rng(0).integers(0, 256, (6, 6, 6, 1), "uint8")
FLOATS = (BYTES / 255).astype("float32")
LABELS = np.array([0, 1, 2, 0, 1, 2])


def model_of(**options):
    keras.utils.set_random_seed(0)
    model = keras_jamba.DHCJamba(**{"image_shape": (6, 6, 1)} | TINY | options)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


BAD = {
    "bytes": (BYTES, r"pixel_range=\(0, 1\).*floating-point.*Received.*uint8.*Divide.*255.*pixel_range=\(0, 255\)"),
    "0 to 255": (FLOATS * 255, r"from 0 to 1.*Received: values from 0 to 255. Divide.*pixel_range=\(0, 255\)"),
    "-1 to 1": (2 * FLOATS - 1, "Received: values from -1 to 1. Scale the images.*pixel_range=None"),
    "NaN": (FLOATS * np.nan, "finite.*Received: values from nan to nan. Remove"),
    "channels first": (FLOATS.transpose(0, 3, 1, 2), r"\(b, H, W, C\).*Received.*numpy.moveaxis\(images, -3, -1\)"),
    "another size": (np.zeros((6, 9, 6, 1), "float32"), r"\(b, H, W, C\).*Received.*9.*Resize"),
    "no channels": (FLOATS[..., 0], r"\(b, H, W, C\).*Received.*add the axis"),
    "text": (np.full((6, 6, 6, 1), "a"), "floating-point.*Received.*Convert"),
    "a dict": ({"images": FLOATS}, "one tensor.*Received.*dict"),
}
ENTRIES = {
    "call": lambda model, x: model(x),
    "extract_features": lambda model, x: model.extract_features(x),
    "check_batch": lambda model, x: model.check_batch(x, LABELS),
    "visualize": lambda model, x: visualize.saliency(model, x),
}
LOOPS = {
    "fit": lambda model, x: model.fit(x, LABELS, verbose=0),
    "evaluate": lambda model, x: model.evaluate(x, LABELS, verbose=0),
    "predict": lambda model, x: model.predict(x, verbose=0),
    "train_on_batch": lambda model, x: model.train_on_batch(x, LABELS),
    "test_on_batch": lambda model, x: model.test_on_batch(x, LABELS),
    "predict_on_batch": lambda model, x: model.predict_on_batch(x),
}


@pytest.mark.parametrize("bad", BAD)
def test_wrong_images_are_refused_by_every_entry(model, bad):
    images, message = BAD[bad]
    for name, enter in ENTRIES.items():
        if not (name == "visualize" and bad == "a dict"):
            with pytest.raises(ValueError, match=message):
                enter(model, images)


@full("jax", "tensorflow")
@pytest.mark.parametrize("loop", LOOPS)
def test_wrong_images_are_refused_by_every_loop_after_good_ones(loop):
    model = model_of()
    LOOPS[loop](model, FLOATS)
    for name, (images, message) in BAD.items():
        if name == "text":
            continue  # Keras refuses the data first.
        with pytest.raises(ValueError, match=message):
            LOOPS[loop](model, images)
    LOOPS[loop](model, FLOATS)


def test_a_traced_call_and_a_functional_model_refuse_shapes_and_dtypes(model):
    for bad in ("bytes", "another size"):
        images, message = BAD[bad]
        with pytest.raises(ValueError, match=message):
            jitted(model)(images)
    with pytest.raises(ValueError, match=BAD["bytes"][1]):
        model(keras.Input((6, 6, 1), dtype="uint8"))
    inputs = keras.Input((6, 6, 1))
    outer = keras.Model(inputs, keras.layers.Softmax()(model(inputs)))
    with pytest.raises(ValueError, match="Received: values from 0 to 255"):
        outer(FLOATS * 255)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other graphs know their shapes")
def test_a_graph_of_unknown_sizes_checks_them_when_it_runs(model):
    import tensorflow as tf

    call = tf.function(lambda x: model(x), input_signature=[tf.TensorSpec((None, None, None, 1))])
    close(call(FLOATS), numpy(model(FLOATS)), absolute=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"\[6,9,6,1\] is not compatible with.*\[\?,6,6,1\]"):
        call(np.zeros((6, 9, 6, 1), "float32"))


def test_floats_may_leave_the_range_by_a_tenth_of_its_width(model):
    model(np.stack([FLOATS[0] * 0 - 0.1, FLOATS[0] * 0 + 1.1]).astype("float32"))
    bytes_model = model_of(pixel_range=(0, 255))
    bytes_model(np.stack([FLOATS[0] * 0 - 25, FLOATS[0] * 0 + 280]))
    for wrong, images in ((model, -0.11), (model, 1.11), (bytes_model, -26.0), (bytes_model, 281.0)):
        with pytest.raises(ValueError, match="a tenth of the width. Received"):
            wrong(np.full((1, 6, 6, 1), images, "float32"))


@full("jax")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_the_model_divides_bytes_by_255_and_keeps_its_weights(model, dtype, tmp_path):
    plain, scaled = (model_of(pixel_range=pixel_range, dtype=dtype) for pixel_range in ((0, 1), (0, 255)))
    assert [v.path for v in plain.weights] == [v.path for v in scaled.weights]
    plain.save_weights(tmp_path / "plain.weights.h5")
    scaled.load_weights(tmp_path / "plain.weights.h5")
    expected = numpy(plain(FLOATS))
    tolerance = dict(absolute=1e-5) if dtype == "float32" else dict(relative=0.02, absolute=0.02)
    for images in (BYTES, BYTES.astype("int32"), BYTES.astype("float32")):
        close(scaled(images), expected, **tolerance)
    close(scaled.predict(BYTES, verbose=0), expected, **tolerance)
    features = numpy(scaled.extract_features(BYTES))
    close(features["tokens"], numpy(plain.extract_features(FLOATS))["tokens"].astype("float32"), **tolerance)
    if dtype == "float32":
        close(visualize.receptive_field(scaled, BYTES), visualize.receptive_field(plain, FLOATS), absolute=1e-5)
        close(255 * visualize.saliency(scaled, BYTES), visualize.saliency(plain, FLOATS), absolute=1e-5)


def test_bytes_and_floats_train_a_model_alike():
    plain, scaled = model_of(), model_of(pixel_range=(0, 255))
    losses = [m.fit(x, LABELS, epochs=2, verbose=0).history["loss"] for m, x in ((plain, FLOATS), (scaled, BYTES))]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_frames_of_a_stream_are_checked_and_scaled_too():
    clips = BYTES[None, :3]
    model = model_of(image_shape=(None, 6, 6, 1), tokens="frames", pixel_range=(0, 255))
    cache = model.init_cache(1)
    for t in range(3):
        logits, cache = model.step(clips[:, t], cache)
    close(logits, numpy(model(clips)), absolute=1e-5)
    with pytest.raises(ValueError, match="Received: values from 0 to 1000"):
        model.step(np.array([0, 1000] * 18, "float32").reshape(1, 6, 6, 1), cache)
    plain = model_of(image_shape=(None, 6, 6, 1), tokens="frames")
    with pytest.raises(ValueError, match=r"Received: images.dtype=uint8.*pixel_range=\(0, 255\)"):
        plain.step(clips[:, 0], plain.init_cache(1))


def test_images_that_are_scaled_already_are_reported_once(caplog):
    model = model_of(pixel_range=(0, 255))
    with caplog.at_level(logging.WARNING):
        model(np.zeros((1, 6, 6, 1), "float32"))
        assert not caplog.records
        model(FLOATS)
        model(FLOATS)
    (record,) = caplog.records
    assert "fractional values from 0 to 1" in record.getMessage() and "pixel_range=(0, 1)" in record.getMessage()


def test_without_a_range_all_floats_and_no_integers_are_accepted():
    model = model_of(pixel_range=None)
    assert np.isnan(numpy(model(FLOATS * np.nan))).all()
    close(model(FLOATS * 1000), model.predict(FLOATS * 1000, verbose=0), absolute=1e-4)
    with pytest.raises(ValueError, match="pixel_range=None.*floating-point.*Received.*uint8"):
        model(BYTES)


def test_the_range_is_saved_and_older_files_default_to_0_to_1(tmp_path):
    for pixel_range in ((0, 255), None):
        model = model_of(pixel_range=pixel_range)
        model.save(tmp_path / "model.keras")
        model.save_to_preset(tmp_path / str(pixel_range))
        loaded = keras.models.load_model(tmp_path / "model.keras")
        from_preset = keras_jamba.DHCJamba.from_preset(tmp_path / str(pixel_range))
        again = keras_jamba.DHCJamba.from_config(model.get_config())
        assert loaded.pixel_range == from_preset.pixel_range == again.pixel_range == pixel_range
        assert type(from_preset.pixel_range) in (tuple, type(None))
    close(loaded(FLOATS), numpy(model(FLOATS)))
    file = tmp_path / "(0, 255)" / "config.json"
    metadata = json.loads(file.read_text())
    assert metadata["config"].pop("pixel_range") == [0, 255]
    # Older files have format 1 and no checksum.
    del metadata["checksum"]
    metadata["format"] = 1
    file.write_text(json.dumps(metadata))
    assert keras_jamba.DHCJamba.from_preset(tmp_path / "(0, 255)").pixel_range == (0, 1)


@once
@pytest.mark.parametrize("good, expected", [([0, 1], (0, 1)), ((0.0, 255.0), (0, 255)), (None, None)])
def test_a_range_may_be_written_in_several_ways(good, expected):
    assert checked_pixel_range(good) == expected


@once
@pytest.mark.parametrize("bad", [(0, 2), (-1, 1), "0-1", 255, (False, True), (0, 1, 2), {0, 1}])
def test_another_range_is_refused(bad):
    with pytest.raises(ValueError, match=r"pixel_range must be \(0, 1\), \(0, 255\) or None. Received.*Scale"):
        model_of(pixel_range=bad)


@once
@pytest.mark.parametrize(
    "shape, tokens, likely",
    [
        ((3, 32, 32), "grid", r"\(32, 32, 3\)"),
        ((1, 28, 28), "grid", r"\(28, 28, 1\)"),
        ((4, 48, 64), "grid", r"\(48, 64, 4\)"),
        ((3, 224, 224), "grid", r"\(224, 224, 3\)"),
        ((16, 3, 32, 32), "frames", r"\(16, 32, 32, 3\)"),
        ((None, 3, 32, 32), "grid+frames", r"\(None, 32, 32, 3\)"),
        ((3, 16, 32, 32), "frames", r"\(16, 32, 32, 3\)"),
    ],
)
def test_channels_on_the_first_axis_are_refused(shape, tokens, likely):
    with pytest.raises(ValueError, match=f"channels on the last axis. Received.*Pass {likely}.*pass None for"):
        checked_image_shape(shape, tokens)


@once
@pytest.mark.parametrize(
    "shape, tokens",
    [
        ((32, 32, 200), "grid"),
        ((None, 32, 32), "grid"),
        ((3, 5, 7), "grid"),
        ((3, 32, 3), "grid"),
        ((4, 64, 64, 3), "frames"),
        ((None, None, 3), "grid"),
    ],
)
def test_spectra_and_small_images_are_not_mistaken_for_channels_first(shape, tokens):
    assert checked_image_shape(shape, tokens) == shape


@once
def test_the_host_reads_tensors_that_need_a_gradient_and_bfloat16():
    import torch

    concrete_numpy = _backend.tensors.concrete_numpy
    x = torch.tensor([1.5, 2.0], requires_grad=True)
    np.testing.assert_array_equal(concrete_numpy(x), [1.5, 2.0])
    np.testing.assert_array_equal(concrete_numpy(x.to(torch.bfloat16)), [1.5, 2.0])
    assert torch.func.grad(lambda x: x.sum() if concrete_numpy(x) is None else x.prod())(x).tolist() == [1, 1]

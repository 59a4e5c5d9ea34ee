"""The public interface of the image classifier."""

import inspect

import keras
import numpy as np
import pytest
from checks import full, numpy

import keras_jamba

TINY = dict(d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=4, downsample=2)


@pytest.fixture
def images():
    return np.random.default_rng(0).random((6, 8, 8, 1), "float32")


@pytest.fixture
def model():
    return keras_jamba.DHCJamba(num_classes=3, image_shape=(8, 8, 1), **TINY)


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def test_logits_are_float32_and_deterministic(model, images):
    logits = model(images)
    assert tuple(logits.shape) == (6, 3)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    np.testing.assert_array_equal(numpy(logits), numpy(model(images)))


@full("tensorflow")
def test_the_logs_hold_the_statistics_of_the_experts(model, images):
    labels = np.array([0, 1, 2, 0, 1, 2])
    logs = compiled(model).fit(images, labels, batch_size=3, verbose=0, validation_data=(images, labels)).history
    for name in ("moe_aux_loss", "moe_max_load", "moe_entropy"):
        assert np.isfinite(logs[name]).all() and np.isfinite(logs[f"val_{name}"]).all()
    assert 1 <= logs["moe_max_load"][0] <= 4 and 0 <= logs["moe_entropy"][0] <= 1


@keras.saving.register_keras_serializable(package="test")
class LastExperts(keras_jamba.layers.Router):
    """A router that strongly prefers the last experts."""

    def choose(self, logits, mask, training):
        return super().choose(logits + 20.0 * keras.ops.arange(self.num_experts, dtype="float32"), mask, training)


def test_capacity_and_custom_router_reach_every_layer_and_are_saved(images, tmp_path):
    model = keras_jamba.DHCJamba(
        num_classes=3, image_shape=(8, 8, 1), **TINY | {"num_layers": 4}, capacity_factor=1.0, router=LastExperts(4, 2)
    )
    routing = numpy(model.extract_features(images)["routing"])
    for block in routing.values():
        np.testing.assert_allclose(block["expert_share"], [0, 0, 0.5, 0.5], atol=1e-6)
        np.testing.assert_allclose(block["drop_rate"], 0.5, atol=1e-6)
    routers = [model.backbone.blocks[i].feed_forward.router for i in (1, 3)]
    assert all(isinstance(router, LastExperts) for router in routers) and routers[0] is not routers[1]
    assert np.abs(numpy(routers[0].kernel) - numpy(routers[1].kernel)).max() > 0
    model.save(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras"),
        keras_jamba.DHCJamba.from_preset(tmp_path / "preset"),
    ):
        np.testing.assert_array_equal(numpy(loaded(images)), numpy(model(images)))
    logs = compiled(model).evaluate(images, np.zeros(6), verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["moe_drop_rate"], 0.5, atol=1e-6)


def test_the_auxiliary_losses_are_part_of_the_loss(model, images):
    labels = np.array([0, 1, 2, 0, 1, 2])
    logs = compiled(model).evaluate(images, labels, verbose=0, return_dict=True)
    logits = model.predict(images, verbose=0)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    cross_entropy = -log_p[np.arange(6), labels].mean()
    assert logs["moe_aux_loss"] > 0
    np.testing.assert_allclose(logs["loss"], cross_entropy + logs["moe_aux_loss"], rtol=1e-4)


def test_save_and_load_keep_the_logits(model, images, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(images)), numpy(model(images)))


def test_the_config_holds_every_argument(model):
    backbone = inspect.signature(keras_jamba.JambaBackbone.__init__).parameters
    own = set(inspect.signature(keras_jamba.DHCJamba.__init__).parameters) - {"backbone"}
    expected = {*own, *backbone} - {"self"}
    assert set(model.get_config()) == expected


def test_extract_features_returns_every_stage(model, images):
    features = numpy(model.extract_features(images))
    routing = features.pop("routing")
    assert routing["block_1"]["logits"].shape[:2] == (6, 16)
    assert {k: v.shape for k, v in features.items()} == {
        "spatial": (6, 4, 4, 8),
        "tokens": (6, 16, 8),
        "block_0": (6, 16, 8),
        "block_1": (6, 16, 8),
        "pooled": (6, 8),
    }
    np.testing.assert_allclose(numpy(model.head(features["pooled"])), numpy(model(images)), rtol=1e-5, atol=1e-6)


def test_a_call_refuses_unknown_arguments(model, images):
    with pytest.raises(TypeError, match="return_routing"):
        model(images, return_routing=True)


def test_a_saved_preset_gives_equal_logits(model, images, tmp_path):
    model.save_to_preset(tmp_path / "mine")
    loaded = keras_jamba.DHCJamba.from_preset(tmp_path / "mine")
    np.testing.assert_array_equal(numpy(loaded(images)), numpy(model(images)))


def test_damaged_weights_are_refused(model, tmp_path):
    model.save_to_preset(tmp_path / "mine")
    file = tmp_path / "mine" / "model.weights.h5"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="sha256.*Received.*load_weights=False"):
        keras_jamba.DHCJamba.from_preset(tmp_path / "mine")


def test_overrides_that_do_not_fit_the_weights_are_refused(model, tmp_path):
    model.save_to_preset(tmp_path / "mine")
    with pytest.raises(ValueError, match="must fit.*Received.*load_weights=False"):
        keras_jamba.DHCJamba.from_preset(tmp_path / "mine", num_layers=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an integer of at least 1. Received"),
        ({"image_shape": (8, 8)}, r"image_shape must be \(H, W, C\).*Received"),
        ({"num_expert": 4}, "Received.*num_expert"),
        ({"num_experts_per_token": 9}, "at most num_experts. Received"),
        ({"num_heads": 3, "mamba_ratio": 1}, "num_heads must divide d_model. Received"),
        ({"moe_offset": 2}, "moe_offset must be smaller than its period, 2. Received"),
        ({"downsample": 3}, "power of two. Received"),
        ({"balance_loss": "none"}, "balance_loss must be one of.*Received"),
    ],
)
def test_bad_arguments_are_reported(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_jamba.DHCJamba(**{"d_model": 8, "num_layers": 2, **arguments})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            np.zeros((2, 8, 8), "float32"),
            r"images must be one tensor of shape \(b, H, W, C\).*Received",
        ),
        (np.zeros((2, 9, 8, 1), "float32"), "Received.*9"),
        (np.zeros((2, 8, 8, 1), "uint8"), "floating-point.*Received.*uint8"),
    ],
)
def test_bad_images_are_reported(model, bad, message):
    with pytest.raises(ValueError, match=message):
        model(bad)


def test_the_error_of_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="large, medium, small.*Received.*'tiny'"):
        keras_jamba.DHCJamba.from_preset("tiny")

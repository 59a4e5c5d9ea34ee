"""Mixture of experts: routing, statistics, capacity, and custom routers."""

import keras
import numpy as np
import pytest
from checks import close, numpy
from keras import ops

from keras_jamba.layers import MoELayer, Router


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((2, 7, 8)).astype("float32")


def test_every_expert_receives_the_tokens_its_router_selects():
    layer = MoELayer(8, num_experts=4, num_experts_per_token=1)
    layer.build((None, None, 8))
    layer.router.kernel.assign(np.eye(8, 4, dtype="float32") * 50)
    tokens = np.eye(4, 8, dtype="float32")[[0, 0, 2, 3]][None]
    layer(tokens)
    np.testing.assert_allclose(numpy(layer.usage), [0.5, 0, 0.25, 0.25])


@pytest.mark.parametrize("balance_loss", ["variance", "switch"])
def test_padding_counts_neither_in_the_losses_nor_in_the_usage(balance_loss, features):
    layer = MoELayer(8, num_experts=4, balance_loss=balance_loss)
    real = layer(features[:, :3])
    expected = numpy(layer.aux_loss), numpy(layer.usage)
    padded = features.copy()
    padded[:, 3:] = 9
    mask = np.broadcast_to(np.arange(7) < 3, (2, 7)).copy()
    outputs = layer(padded, mask=mask)
    np.testing.assert_allclose(numpy(outputs)[:, :3], numpy(real), atol=1e-5)
    np.testing.assert_allclose(numpy(layer.aux_loss), expected[0], rtol=1e-5)
    np.testing.assert_allclose(numpy(layer.usage), expected[1], rtol=1e-5)


def test_auxiliary_losses_are_added_with_their_coefficients(features):
    layer = MoELayer(8, num_experts=4, balance_coefficient=0.0, z_coefficient=2.0)
    _, routing = layer(features, return_routing=True)
    z = np.log(np.exp(numpy(routing["logits"])).sum(-1)) ** 2
    np.testing.assert_allclose(numpy(sum(layer.losses)), 2 * z.mean(), rtol=1e-5)
    np.testing.assert_allclose(numpy(layer.aux_loss), 2 * z.mean(), rtol=1e-5)


def test_every_call_can_return_its_routing(features):
    layer = MoELayer(8, num_experts=4)
    outputs, routing = layer(features, return_routing=True)
    routing = numpy(routing)
    np.testing.assert_allclose(numpy(outputs), numpy(layer(features)), atol=1e-6)
    logits = features @ numpy(layer.router.kernel)
    np.testing.assert_allclose(routing["logits"], logits, atol=1e-5)
    order = np.argsort(-logits, axis=-1)[..., :2]
    np.testing.assert_array_equal(routing["indices"], order)
    chosen = np.exp(np.take_along_axis(logits, order, axis=-1))
    np.testing.assert_allclose(routing["weights"], chosen / chosen.sum(-1, keepdims=True), rtol=1e-4)
    share = np.bincount(order.reshape(-1), minlength=4) / order.size
    np.testing.assert_allclose(routing["expert_share"], share, rtol=1e-6)
    np.testing.assert_allclose(routing["max_load"], share.max() * 4, rtol=1e-6)
    used = share[share > 0]
    np.testing.assert_allclose(routing["entropy"], -(used * np.log(used)).sum() / np.log(4), rtol=1e-5)
    assert routing["drop_rate"] == 0
    specs = layer.compute_output_spec(keras.KerasTensor((2, 7, 8)), return_routing=True)[1]
    assert {k: (v.shape, v.dtype) for k, v in specs.items()} == {k: (v.shape, str(v.dtype)) for k, v in routing.items()}


def test_decisions_are_returned_without_statistics(features):
    layer = MoELayer(8, num_experts=4)
    complete = numpy(layer(features, return_routing=True)[1])
    decisions = numpy(layer(features, return_routing="decisions")[1])
    assert set(decisions) == {"logits", "probabilities", "weights", "indices"}
    for name, x in decisions.items():
        np.testing.assert_allclose(x, complete[name], rtol=1e-6)
    np.testing.assert_allclose(numpy(layer.usage), complete["expert_share"], rtol=1e-6)
    specs = layer.compute_output_spec(keras.KerasTensor((2, 7, 8)), return_routing="decisions")[1]
    assert set(specs) == set(decisions)


def test_a_loss_with_coefficient_0_is_not_computed(features, monkeypatch):
    monkeypatch.setattr("keras_jamba.layers.router.router_z_loss", None)
    layer = MoELayer(8, num_experts=4, balance_coefficient=0.5, z_coefficient=0.0)
    _, routing = layer(features, return_routing=True)
    usage = numpy(routing["probabilities"]).reshape(-1, 4).mean(0)
    np.testing.assert_allclose(numpy(layer.aux_loss), 0.5 * ((usage - 0.25) ** 2).sum(), rtol=1e-4)
    monkeypatch.setattr("keras_jamba.layers.router.variance_balance_loss", None)
    layer = MoELayer(8, num_experts=4, balance_coefficient=0.0, z_coefficient=0.0)
    layer(features)
    assert float(numpy(layer.aux_loss)) == 0


def test_tokens_beyond_the_capacity_are_dropped_and_counted(features):
    layer = MoELayer(8, num_experts=4, num_experts_per_token=1, capacity_factor=1.0)
    layer.build((None, None, 8))
    layer.router.kernel.assign(np.eye(8, 4, dtype="float32") * 50)
    tokens = np.eye(4, 8, dtype="float32")[[0, 0, 0, 3, 0, 1, 2, 2]][None]
    mask = np.array([[True, False, True, True, True, True, True, True]])
    outputs, routing = layer(tokens, mask=mask, return_routing=True)
    # The capacity is 8 / 4 = 2 tokens: expert 0 keeps its first and third token, and the second is padding.
    dropped = np.abs(numpy(outputs)[0]).sum(-1) == 0
    np.testing.assert_array_equal(dropped, [False, True, False, False, True, False, False, False])
    np.testing.assert_allclose(numpy(routing["drop_rate"]), 1 / 7, rtol=1e-6)
    np.testing.assert_allclose(numpy(layer.drop_rate), 1 / 7, rtol=1e-6)


def test_a_sufficient_capacity_changes_nothing(features):
    layer = MoELayer(8, num_experts=4)
    limited = MoELayer(8, num_experts=4, capacity_factor=4.0)
    limited.build(features.shape)
    outputs = layer(features)
    limited.set_weights(layer.get_weights())
    close(limited(features), numpy(outputs), absolute=1e-5)
    assert float(numpy(limited.drop_rate)) == 0


@keras.saving.register_keras_serializable(package="test")
class InTurn(Router):
    """A router that sends token i to the experts i and i + 1, regardless of its logits."""

    def choose(self, logits, mask, training):
        first = ops.arange(ops.shape(logits)[0])[:, None] + ops.arange(self.num_experts_per_token)[None]
        indices = ops.cast(ops.mod(first, self.num_experts), "int32")
        weights = ops.full(ops.shape(indices), 1.0 / self.num_experts_per_token)
        return weights, indices, ops.softmax(logits, axis=-1)

    def auxiliary_loss(self, routing, mask):
        return ops.convert_to_tensor(0.25)


def test_a_custom_router_decides_and_is_saved(features, tmp_path):
    inputs = keras.Input((7, 8))
    layer = MoELayer(8, router=InTurn(4, 2))
    model = keras.Model(inputs, layer(inputs))
    routing = numpy(layer(features, return_routing=True)[1])
    np.testing.assert_array_equal(routing["indices"].reshape(-1, 2)[:5], [[0, 1], [1, 2], [2, 3], [3, 0], [0, 1]])
    close(layer.aux_loss, 0.25)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.layers[-1].router, InTurn)
    np.testing.assert_array_equal(numpy(loaded(features)), numpy(model(features)))


def test_the_router_is_float32_under_mixed_precision(features):
    layer = MoELayer(8, num_experts=4, dtype="mixed_bfloat16")
    features = ops.cast(features, "bfloat16")
    _, routing = layer(features, return_routing=True)
    logits = numpy(ops.cast(features, "float32")) @ numpy(layer.router.kernel)
    np.testing.assert_allclose(numpy(routing["logits"]), logits, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(router="top"), "router must be a keras_jamba.layers.Router or None. Received: router='top'"),
        (dict(capacity_factor=0), "capacity_factor must be"),
        (dict(num_experts_per_token=9), "num_experts_per_token must be at most num_experts"),
    ],
)
def test_bad_arguments_are_reported(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoELayer(8, **arguments)

"""Gradient checkpointing: equal numbers and less stored memory."""

import keras
import numpy as np
import pytest
from checks import full, jitted, numpy

import keras_jamba

X = np.random.default_rng(0).random((4, 8, 8, 1)).astype("float32")
Y = np.array([0, 1, 2, 1])


def trained(checkpointing, **compiling):
    keras.utils.set_random_seed(0)
    model = keras_jamba.DHCJamba(
        num_classes=3,
        image_shape=(8, 8, 1),
        d_model=8,
        num_layers=2,
        mamba_ratio=1,
        num_experts=4,
        num_heads=2,
        dropout=0.3,
        drop_path=0.2,
        gradient_checkpointing=checkpointing,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, **compiling)
    logs = [model.train_on_batch(X, Y, return_dict=True) for _ in range(2)]
    return logs, numpy([v.value for v in model.variables])


WAYS = [{}, {"jit_compile": True}, {"run_eagerly": True}] if keras.backend.backend() == "tensorflow" else [{}]


@full("tensorflow")
@pytest.mark.parametrize("how", WAYS)
def test_checkpointing_keeps_loss_gradients_dropout_and_statistics(how):
    plain, checkpointed = trained(False, **how), trained(True, **how)
    for a, b in zip(plain[0], checkpointed[0], strict=True):
        assert a.keys() == b.keys() and {"loss", "moe_aux_loss", "moe_max_load"} <= a.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=name)
    for a, b in zip(plain[1], checkpointed[1], strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6, rtol=1e-5)


class OnDicts(keras_jamba.JambaBackbone):
    """Takes its call arguments as one dict, as `fit` passes it."""

    def check_batch(self, x, y=None, sample_weight=None):
        pass

    def call(self, inputs, training=None):
        return super().call(**inputs, training=training)


@full("jax", "tensorflow")
@pytest.mark.parametrize("how", WAYS)
def test_checkpointing_keeps_training_with_masks_documents_and_states(how):
    rng = np.random.default_rng(2)
    features, y = rng.standard_normal((2, 2, 6, 8)).astype("float32")
    results = []
    for checkpointing in (False, True):
        keras.utils.set_random_seed(0)
        sizes = dict(d_model=8, num_layers=3, mamba_ratio=2, num_experts=4, num_heads=2)
        model = OnDicts(**sizes, gradient_checkpointing=checkpointing)
        model.compile(keras.optimizers.SGD(0.1), "mse", **how)
        model.build((None, None, 8))
        state = keras_jamba.JambaBackbone.call(model, -features, return_state=True)[1]
        given = dict(features=features, initial_state=numpy(state))
        given["padding_mask"] = np.arange(6) >= np.array([[0], [2]])
        given["segment_ids"] = np.array([[0, 0, 1, 1, 1, 1]] * 2, "int32")
        given["reset_mask"] = np.arange(6)[None] == np.array([[4], [3]])
        losses = [model.train_on_batch(given, y) for _ in range(2)]
        results.append((losses, numpy([v.value for v in model.variables])))
    for a, b in zip(*map(keras.tree.flatten, results), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6, rtol=1e-5)


@pytest.fixture
def backbone():
    keras.utils.set_random_seed(1)
    sizes = dict(d_model=8, num_layers=2, mamba_ratio=1, num_experts=4, num_heads=2)
    return keras_jamba.JambaBackbone(**sizes, gradient_checkpointing=True)


def test_states_masks_and_documents_pass_through(backbone):
    x = np.random.default_rng(1).standard_normal((2, 6, 8)).astype("float32")
    mask = np.array([[True] * 6, [False] * 2 + [True] * 4])
    ids = np.array([[0, 0, 1, 1, 1, 1]] * 2)
    _, state = backbone(x, return_state=True)
    given = dict(padding_mask=mask, segment_ids=ids, initial_state=state, return_state=True, return_routing=True)
    call = lambda training: numpy(jitted(lambda x: backbone(x, **given, training=training))(x))  # noqa: E731
    plain, recomputed = call(False), call(True)
    keras.tree.map_structure(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, recomputed)


def test_checkpointing_stores_less_for_the_backward_pass(backbone):
    """Counts the residuals that PyTorch saves between the blocks' inputs and outputs."""
    if keras.backend.backend() != "torch":
        pytest.skip(
            "Only PyTorch reports what it saves for the gradient; benchmarks/training/checkpointing.py has the rest"
        )
    import torch

    x = torch.randn(2, 64, 8)

    def stored(training):
        sizes = {}

        def save(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            outputs = backbone(x, training=training)
        del outputs
        return sum(sizes.values())

    assert stored(True) < 0.5 * stored(False)

"""Mixed precision, and very long sequences."""

import keras
import numpy as np
import pytest
from checks import full, gradients, numpy, variable_gradients
from keras import ops

import keras_jamba
from keras_jamba.layers import MambaLayer
from keras_jamba.layers._norm import RMSNorm

POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]


@full("jax")
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_overflows_in_65536_tokens(policy):
    keras.utils.set_random_seed(0)
    layer = MambaLayer(4, mixer_rms_norm=True, dtype=policy)
    layer.build((1, None, 4))
    x = ops.convert_to_tensor(3 * np.random.default_rng(0).standard_normal((1, 65536, 4)).astype("float32"))
    x = ops.cast(x, layer.compute_dtype)
    outputs, state = layer(x, return_state=True)
    assert state["ssm"].dtype == ops.zeros(1, "float32").dtype
    for value in (outputs, *state.values()):
        assert np.isfinite(numpy(ops.cast(value, "float32"))).all()
    loss = lambda: ops.mean(ops.square(ops.cast(layer(x), "float32")))  # noqa: E731
    for gradient in variable_gradients(loss, layer.trainable_variables):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@full()
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_model_learns_in_mixed_precision(policy):
    keras.utils.set_random_seed(0)
    sizes = dict(d_model=8, num_layers=2, mamba_ratio=1, num_experts=4, num_heads=2)
    model = keras_jamba.DHCJamba(num_classes=3, image_shape=(8, 8, 1), **sizes, dtype=policy)
    rng = np.random.default_rng(0)
    labels = np.arange(12) % 3
    images = (0.2 * rng.random((12, 8, 8, 1)) + labels[:, None, None, None] * 0.3).astype("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-2), loss, metrics=["accuracy"])
    losses = model.fit(images, labels, batch_size=12, epochs=25, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < 0.5 * losses[0]
    # Trainable variables and the parameters of the state space stay in float32.
    for variable in model.trainable_variables:
        assert variable.dtype == "float32"
    for block in model.backbone.blocks:
        if isinstance(block.mixer, MambaLayer):
            for name in ("A_log", "dt_bias", "D"):
                assert getattr(block.mixer.ssm, name).value.dtype == ops.zeros(1, "float32").dtype


@pytest.mark.parametrize("policy", POLICIES)
def test_the_norm_and_its_gradient_equal_keras(policy):
    rng = np.random.default_rng(0)
    x, weights = (ops.convert_to_tensor(rng.standard_normal((2, 5, 48)).astype("float32")) for _ in range(2))
    found = []
    for kind in (RMSNorm, keras.layers.RMSNormalization):
        layer = kind(epsilon=1e-3, dtype=policy)
        layer.build((None, None, 48))
        layer.scale.assign(np.linspace(0.5, 2, 48))
        inputs = ops.cast(x, layer.compute_dtype)
        assert keras.backend.standardize_dtype(layer(inputs).dtype) == layer.compute_dtype
        loss = lambda x, layer=layer: ops.sum(ops.cast(layer(x), "float32") * weights)  # noqa: E731
        values = layer(inputs), *(ops.cast(g, "float32") for g in gradients(loss, [ops.cast(inputs, "float32")]))
        found.append([numpy(ops.cast(v, "float32")) for v in values])
    for a, e in zip(*found, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5 if policy == "float32" else 1e-2, atol=1e-5)

"""Checks of all layers: shapes, dynamic lengths, round trips, precision and errors; then checks of single layers."""

import keras
import numpy as np
import pytest
from checks import full, numpy
from keras import ops

from keras_jamba.layers import (
    AttentionLayer,
    FeedForward,
    JambaBlock,
    MambaLayer,
    MoELayer,
    SpatialEncoder,
)
from keras_jamba.layers._norm import RMSNorm
from keras_jamba.layers._projection import Projection

LAYERS = {
    "mamba": lambda **kw: MambaLayer(8, d_state=4, mixer_rms_norm=True, proj_bias=True, **kw),
    "bidirectional": lambda **kw: MambaLayer(8, d_state=4, bidirectional=True, **kw),
    "attention": lambda **kw: AttentionLayer(8, num_heads=4, num_kv_heads=1, **kw),
    "feed_forward": lambda **kw: FeedForward(8, use_swiglu=False, **kw),
    "moe": lambda **kw: MoELayer(8, num_experts=4, balance_loss="switch", **kw),
    "block": lambda **kw: JambaBlock(MambaLayer(8, **kw), MoELayer(8, **kw), dropout=0.1, drop_path=0.1, **kw),
}


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((2, 7, 8)).astype("float32")


@full("jax")
@pytest.mark.parametrize("name", LAYERS)
def test_config_and_weights_restore_a_layer(name, features):
    layer = LAYERS[name]()
    outputs = numpy(layer(features))
    twin = type(layer).from_config(layer.get_config())
    twin.build(features.shape)
    twin.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(twin(features)), outputs)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_trains_in_a_model_of_unknown_length(name, features):
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, LAYERS[name]()(inputs))
    model.compile("adam", "mse")
    before = [numpy(v).copy() for v in model.trainable_variables]
    for length in (7, 4):
        model.train_on_batch(features[:, :length], features[:, :length])
    after = [numpy(v) for v in model.trainable_variables]
    moved = [not np.array_equal(a, b) for a, b in zip(after, before, strict=True)]
    assert all(moved), [v.path for v, m in zip(model.trainable_variables, moved, strict=True) if not m]
    assert all(np.isfinite(a).all() for a in after)


# On JAX the test above uses XLA. On PyTorch compiling takes a minute per layer and is not Keras' default.
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow needs jit_compile=True for XLA")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_trains_under_xla(name, features):
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, LAYERS[name]()(inputs))
    model.compile("sgd", "mse", jit_compile=True)
    assert np.isfinite(model.train_on_batch(features, features))


@full("jax")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_layer_computes_in_mixed_precision_close_to_float32(name, policy, features):
    layer = LAYERS[name]()
    expected = numpy(layer(features))
    low = LAYERS[name](dtype=policy)
    low.build(features.shape)
    low.set_weights(layer.get_weights())
    actual = low(features)
    assert keras.backend.standardize_dtype(actual.dtype) == low.compute_dtype
    np.testing.assert_allclose(numpy(ops.cast(actual, "float32")), expected, atol=0.1)


@pytest.mark.parametrize("name", ["mamba", "attention", "block"])
def test_a_functional_model_can_return_a_state(name, features):
    layer = LAYERS[name]()
    inputs = keras.Input((None, 8))
    outputs, state = layer(inputs, return_state=True)
    expected = layer(features, return_state=True)[1]
    for leaf, value in keras.Model(inputs, [outputs, state])(features)[1].items():
        np.testing.assert_allclose(numpy(value), numpy(expected[leaf]), atol=1e-5, err_msg=leaf)


def test_a_custom_mixer_must_accept_the_arguments_it_receives(features):
    block = JambaBlock(keras.layers.Identity(), FeedForward(8))
    with pytest.raises(ValueError, match="needs a mixer whose call takes them. Received: a Identity without"):
        block(features, segment_ids=np.zeros((2, 7), "int32"))


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrong_width_is_reported(name):
    with pytest.raises(ValueError, match=r"must have the shape \(b, t, 8\). Received: shape=\(2, 7, 9\)"):
        LAYERS[name]().build((2, 7, 9))


def test_mamba_is_causal_and_selective(features):
    layer = MambaLayer(8)
    outputs = numpy(layer(features))
    changed = features.copy()
    changed[:, 4] += 1
    difference = np.abs(numpy(layer(changed)) - outputs).max(axis=(0, 2))
    assert (difference[:4] == 0).all() and (difference[4:] > 0).all()


def test_the_time_step_bias_starts_between_dt_min_and_dt_max():
    inputs = keras.Input((4, 8))
    layer = MambaLayer(8, dt_min=1e-3, dt_max=1e-1)
    keras.Model(inputs, keras.layers.Dense(3)(layer(inputs)))
    steps = np.log1p(np.exp(numpy(layer.ssm.dt_bias).astype("float64")))
    assert (steps >= 0.999e-3).all() and (steps <= 1.001e-1).all() and steps.std() > 0
    np.testing.assert_allclose(numpy(layer.ssm.A_log)[3], np.log(np.arange(1, 17)), rtol=1e-6)


def test_drop_path_drops_complete_branches_per_sequence(features):
    block = JambaBlock(keras.layers.Identity(), keras.layers.Identity(), drop_path=0.75)
    x = np.repeat(features, 64, axis=0)

    def branch(x):
        return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)

    once, twice = x + 4 * branch(x), x + 4 * branch(x) + 4 * branch(x + 4 * branch(x))
    candidates = np.stack([x, once, twice])
    outputs = numpy(block(x, training=True))
    chosen = np.abs(candidates - outputs).max(axis=(2, 3)).argmin(axis=0)
    np.testing.assert_allclose(outputs, candidates[chosen, np.arange(len(x))], atol=1e-5)
    # Expected counts of 128 sequences: 72 keep no branch, 48 keep one, 8 keep both.
    counts = np.bincount(chosen, minlength=3)
    assert 50 < counts[0] < 94 and 26 < counts[1] < 70 and 0 < counts[2] < 25, counts
    np.testing.assert_allclose(numpy(block(x)), x + branch(x) + branch(x + branch(x)), atol=1e-5)


def test_causal_attention_does_not_look_ahead(features):
    layer = AttentionLayer(8, num_heads=2)
    outputs = numpy(layer(features))
    changed = features.copy()
    changed[:, 4] += 1
    difference = np.abs(numpy(layer(changed)) - outputs).max(axis=(0, 2))
    assert (difference[:4] < 1e-6).all() and (difference[4:] > 1e-6).all()


@pytest.mark.parametrize(("downsample", "side"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_the_encoder_returns_a_downsampled_grid(downsample, side):
    encoder = SpatialEncoder(6, downsample)
    assert tuple(encoder(np.zeros((2, 8, 8, 3), "float32")).shape) == (2, side, side, 6)
    assert encoder.compute_output_shape((2, 8, 8, 3)) == (2, side, side, 6)


class Ragged(keras.utils.PyDataset):
    """Batches of changing size and length; `fit` compiles for unknown sizes where the backend supports it."""

    SIZES = ((2, 7), (1, 4), (3, 5))

    def __len__(self):
        return len(self.SIZES)

    def __getitem__(self, index):
        x = np.random.default_rng(index).standard_normal((*self.SIZES[index], 8)).astype("float32")
        return x, np.cos(x)


@full("jax", "tensorflow")
# PyTorch's compiler unrolls the loop over tokens, a minute per length: test eager mode only.
@pytest.mark.parametrize("compiled", [False] if keras.backend.backend() == "torch" else [False, True])
def test_fit_takes_batches_of_changing_size_and_length(compiled):
    inputs = keras.Input((None, 8))
    layer = MambaLayer(8, d_state=4)
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=compiled)
    reference = MambaLayer(8, d_state=4, implementation="reference")
    reference.build((None, None, 8))
    reference.set_weights(layer.get_weights())
    batches = [Ragged()[i] for i in range(3)]
    errors = [((numpy(reference(x)) - y) ** 2).mean(axis=(1, 2)) for x, y in batches]
    expected = np.concatenate(errors).mean()
    logs = model.fit(Ragged(), epochs=1, verbose=0, shuffle=False)
    np.testing.assert_allclose(logs.history["loss"][0], expected, rtol=1e-4)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=compiled)
    model.fit(Ragged(), epochs=2, verbose=0, shuffle=False)
    assert model.evaluate(Ragged(), verbose=0) < expected


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_small_layers_equal_the_call_of_keras_layers(dtype):
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype("float32")
    for layer in (Projection(4, use_bias=True, dtype=dtype), RMSNorm(dtype=dtype)):
        for inputs in (x, ops.cast(x, layer.compute_dtype), ops.cast(x, "float16")):
            found, expected = layer(inputs), keras.layers.Layer.__call__(layer, inputs)
            assert found.dtype == expected.dtype == ops.cast(x, layer.compute_dtype).dtype
            np.testing.assert_array_equal(numpy(ops.cast(found, "float32")), numpy(ops.cast(expected, "float32")))
        assert layer(keras.Input((3, 8))).shape[:2] == (None, 3)
        masked = keras.layers.Masking()(x * (x > 0).all(-1, keepdims=True))
        mask = getattr(layer(masked), "_keras_mask", None)
        assert mask is not None and mask.shape == (2, 3)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="hooks are PyTorch's")
def test_hooks_of_small_layers_are_called():
    layer, seen = Projection(4), []
    layer(ops.ones((2, 3, 8)))
    handle = layer.register_forward_hook(lambda *given: seen.append(given))
    layer(ops.ones((2, 3, 8)))
    handle.remove()
    layer(ops.ones((2, 3, 8)))
    assert len(seen) == 1

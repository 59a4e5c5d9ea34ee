"""JambaAdamW: weight decay, clipping, warmup, weight averages and saved models."""

import keras
import numpy as np
import pytest
from checks import close, full, numpy, torch_operations
from small_training import batch, compiled, small_model

import keras_jamba
from keras_jamba import training

NEVER = ("A_log", "/D", "dt_bias", "conv_", "norm", "bias", "router", "gamma", "beta")


def test_only_matrices_decay():
    model = small_model(conv_bias=True, proj_bias=True)
    optimizer = training.optimizer(model, steps=10)
    decayed = {v.path for v in optimizer.decayed(model.trainable_variables)}
    others = {v.path for v in model.trainable_variables} - decayed
    names = {path.rsplit("/", 2)[-2] if path.endswith("kernel") else path.rsplit("/", 1)[-1] for path in decayed}
    assert names == {
        *("in_proj", "x_proj", "dt_proj", "out_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
        *("down_proj", "gate_bank", "up_bank", "down_bank", "head"),
    }
    assert all(any(part in path for part in NEVER) for path in others)


@full("jax")
def test_a_step_with_zero_gradients_shrinks_decayed_weights_only():
    """With zero gradients only the weight decay moves weights."""
    model = small_model()
    optimizer = training.JambaAdamW(learning_rate=0.5, weight_decay=0.1)
    optimizer.build(model.trainable_variables)
    before = [numpy(v) for v in model.trainable_variables]
    optimizer.apply([keras.ops.zeros(v.shape) for v in model.trainable_variables])
    decayed = {id(v) for v in optimizer.decayed(model.trainable_variables)}
    assert 0 < len(decayed) < len(before)
    for variable, old in zip(model.trainable_variables, before, strict=True):
        close(variable, old * (1 - 0.5 * 0.1 if id(variable) in decayed else 1))


@full("jax", "tensorflow")
def test_a_loaded_model_decays_the_same_weights(tmp_path):
    model = compiled(small_model(), no_decay=["head"])
    model.train_on_batch(*batch())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, training.JambaAdamW)
    not_decayed = [v.path for v in model.trainable_variables if not model.optimizer._use_weight_decay(v)]
    again = [v.path for v in loaded.trainable_variables if not loaded.optimizer._use_weight_decay(v)]
    assert not_decayed == again and "head/kernel" in again[-2] + again[-1]
    for trained in (model, loaded):
        trained.train_on_batch(*batch())
    for a, e in zip(loaded.weights, model.weights, strict=True):
        close(a, e, absolute=1e-6)


@pytest.mark.parametrize("accumulated", [None, 2])
def test_the_global_gradient_norm_is_recorded_and_clipped(accumulated):
    variable = keras.Variable(np.zeros((2, 2), "float32"), name="kernel")
    optimizer = training.JambaAdamW(1.0, global_clipnorm=1.0, gradient_accumulation_steps=accumulated)
    optimizer.build([variable])
    seen = []
    clip = optimizer._clip_all
    optimizer._clip_all = lambda grads: seen.append(clip(grads)) or seen[-1]
    gradients = [np.full((2, 2), 2, "float32"), np.full((2, 2), 4, "float32")]
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)])
    mean = np.mean(gradients, axis=0) if accumulated else gradients[-1]
    close(optimizer.gradient_norm, np.linalg.norm(mean))
    if keras.backend.backend() != "tensorflow" or not accumulated:
        close(seen[-1][0], mean / np.linalg.norm(mean))


@full("jax", "tensorflow")
def test_a_model_with_averaged_weights_predicts_continues_and_saves(tmp_path):
    model = compiled(small_model(moe_frequency=0), use_ema=True, ema_momentum=0.5)
    x, y = batch()
    for _ in range(2):
        model.fit(x, y, batch_size=4, verbose=0)
        for _ in range(2):
            logits = model.predict(x, verbose=0)
    model.save_to_preset(tmp_path / "averaged")
    loaded = keras_jamba.DHCJamba.from_preset(tmp_path / "averaged")
    close(loaded(x), logits, absolute=1e-5)


@pytest.mark.parametrize("momentum, accumulated", [(0.6, None), (0.9995, None), (0.6, 3)])
def test_the_weight_average_starts_at_the_first_step_with_low_momentum(momentum, accumulated):
    rng = np.random.default_rng(0)
    variable = keras.Variable(rng.random((2, 2), "float32"), name="kernel")
    optimizer = training.JambaAdamW(0.1, use_ema=True, ema_momentum=momentum, gradient_accumulation_steps=accumulated)
    optimizer.build([variable])
    expected = 0.0
    for step in range(20):
        optimizer.apply([keras.ops.convert_to_tensor(rng.standard_normal((2, 2), "float32"))])
        weight = numpy(variable).astype("float64")
        updates = step // (accumulated or 1)
        kept = min(momentum, updates / (updates + 9))
        expected = kept * expected + (1 - kept) * weight
        close(optimizer._model_variables_moving_average[0], expected, absolute=1e-6)
    optimizer.finalize_variable_values([variable])
    close(variable, expected, absolute=1e-6)


def test_sparse_embedding_gradients_are_clipped():
    model = keras.Sequential([keras.layers.Embedding(7, 4), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.build((None, 2))
    compiled(model).train_on_batch(np.array([[1, 2], [3, 3]]), np.array([0, 1]))
    assert 0 < float(model.optimizer.gradient_norm) < 10


def test_the_learning_rate_warms_up_and_decays_along_a_cosine():
    rate = training.schedule(100, learning_rate=2.0, final=0.25)
    found = [float(rate(step)) for step in (0, 5, 10, 55, 100)]
    close(np.array(found), np.array([0, 1, 2, 2 * (0.25 + 0.75 / 2), 0.5]))


def test_the_defaults_are_the_documented_ones():
    config = training.optimizer(small_model(), steps=100).get_config()
    rate = config["learning_rate"]["config"]
    assert config["global_clipnorm"] == 1.0
    assert (rate["warmup_target"], rate["warmup_steps"], rate["decay_steps"]) == (1e-4, 10, 90)


@full("jax", "tensorflow")
def test_mixed_float16_wraps_the_optimizer_in_loss_scaling():
    model = small_model(dtype="mixed_float16")
    compiled(model).train_on_batch(*batch())
    assert np.isfinite(float(model.optimizer.inner_optimizer.gradient_norm))


@full("jax", "tensorflow")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be.*Received: steps=0"),
        ({"steps": 10, "warmup": 2}, "warmup must be.*Received: warmup=2"),
        ({"steps": 10, "weight_decay": -1}, "weight_decay must be.*Received: weight_decay=-1"),
        ({"steps": 10, "no_decay": "."}, "something to act on.*Received: weight_decay=0.1.*no_decay"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        training.optimizer(small_model(), **arguments)


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="has weights to train.*Received.*built=False.*Build it"):
        training.optimizer(keras.Sequential([keras.layers.Dense(3)]), steps=10)


def by_hand(values, gradients, rates, decay, amsgrad, limit=1.0):
    """Returns the arrays after a few steps, computed in float64. The last array does not decay."""
    values = [v.astype("float64") for v in values]
    m, v, top = ([np.zeros_like(x) for x in values] for _ in range(3))
    for step, (grads, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = np.sqrt(sum((g.astype("float64") ** 2).sum() for g in grads))
        alpha = rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        for i, g in enumerate(grads):
            g = g * min(1.0, limit / norm)
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            top[i] = np.maximum(top[i], v[i])
            values[i] *= 1 - rate * decay * (i < len(values) - 1)
            values[i] -= alpha * m[i] / (np.sqrt((top if amsgrad else v)[i]) + 1e-3)
    return values


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"amsgrad": True, "weight_decay": 0.3}])
@pytest.mark.parametrize("scheduled", [True, False])
def test_steps_match_the_formula(options, scheduled):
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (2, 3, 4), (5,)]
    values = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    gradients = [[rng.standard_normal(s).astype("float32") * scale for s in shapes] for scale in (1, 0.01, 3, 1)]
    variables = [keras.Variable(v, name=name) for v, name in zip(values, ("kernel", "kernel", "bias"), strict=True)]
    rate = training.schedule(10, 0.5, warmup=0.3) if scheduled else 0.05
    optimizer = training.JambaAdamW(rate, epsilon=1e-3, **{"weight_decay": 0.1} | options)
    optimizer.build(variables)
    for grads in gradients:
        # The memory layout differs from the weight's, as the gradient of a product may have it.
        optimizer.apply([keras.ops.transpose(g.T.copy(), tuple(range(g.ndim))[::-1]) for g in grads])
    rates = [float(rate(step)) for step in range(4)] if scheduled else [rate] * 4
    decay = options.get("weight_decay", 0.1)
    for a, e in zip(variables, by_hand(values, gradients, rates, decay, "amsgrad" in options), strict=True):
        # Keras computes 1 - beta_2 ** step in float32, which loses digits.
        close(a, e, absolute=1e-5)


def test_a_step_uses_the_iteration_count_of_the_optimizer():
    """Other code may assign `iterations`, for example when it loads a file."""
    results = []
    for numbers in ((0, 1, 7, 8), (0, None, 7, None)):
        variable = keras.Variable(np.ones((2, 2), "float32"), name="kernel")
        optimizer = training.JambaAdamW(training.schedule(10))
        optimizer.build([variable])
        for number in numbers:
            if number is not None:
                optimizer.iterations.assign(number)
            optimizer.apply([keras.ops.ones((2, 2))])
        assert int(optimizer.iterations) == 9
        results.append(numpy(variable.value))
    np.testing.assert_array_equal(*results)
    assert float(optimizer.learning_rate) == pytest.approx(float(training.schedule(10)(9)))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="other backends compile a step")
def test_more_weights_require_no_more_operations():
    seen = []
    for count in (2, 20):
        variables = [keras.Variable(np.ones((2, 2), "float32"), name="kernel") for _ in range(count)]
        optimizer = training.JambaAdamW(training.schedule(10))
        optimizer.build(variables)
        gradients = [keras.ops.ones((2, 2))] * count
        found = torch_operations(lambda step=optimizer.apply, gradients=gradients: step(gradients))
        seen.append([name for name, _ in found if name != "aten::detach"])
    assert len(seen[0]) == len(seen[1]) and "aten::_fused_adamw_" in seen[1]

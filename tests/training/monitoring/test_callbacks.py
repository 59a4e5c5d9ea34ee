"""Monitoring, profiling and the largest batch, as `fit` calls them."""

import csv
import sys

import keras
import numpy as np
import pytest
from checks import full
from small_training import batch, compiled, small_model

from keras_jamba import _backend, training
from keras_jamba.training.monitoring import _devices


class UsageRecorder(keras.callbacks.Callback):
    """Callback that records the usage of the experts after each step."""

    def __init__(self):
        super().__init__()
        self.shares = []

    def on_train_batch_end(self, batch, logs=None):
        layer = self.model.backbone.blocks[1].feed_forward
        self.shares.append(keras.ops.convert_to_numpy(layer.usage).copy())


def perceptron():
    """Returns a model that compiles fast."""
    layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dropout(0.1), keras.layers.Dense(3)]
    return keras.Sequential(layers)


def fit(callbacks, steps=9, model=None):
    x, y = batch()
    model = compiled(model or perceptron(), steps=steps)
    history = model.fit(np.tile(x, (steps, 1, 1, 1)), np.tile(y, steps), 4, 1, 0, callbacks, shuffle=False)
    return model, history.history


@full("jax", "tensorflow")
def test_measurements_are_in_the_csv_file_tensorboard_and_the_logs(tmp_path):
    usage, recorder = training.ExpertUsage(), UsageRecorder()
    probes = [usage, training.Throughput(4, tokens=4), training.Memory(), training.GradientNorm()]
    probes += [training.LearningRate(), training.Utilisation(1e6, peak="measured")]
    monitor = training.Monitor(probes, every=3, csv=tmp_path / "log.csv", tensorboard=tmp_path / "board")
    model, history = fit([recorder, monitor], model=small_model())
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # The first step starts the clock. Then every third step has a row, and so has the rest of the epoch.
    assert [int(row["step"]) for row in rows] == [4, 7, 9]
    name = "block_1/feed_forward"
    for row, step in zip(rows, (4, 7, 9), strict=True):
        shares = recorder.shares[step - 1]
        assert [float(row[f"{name}/expert_{i}"]) for i in range(2)] == pytest.approx(shares.tolist())
        entropy = -sum(s * np.log(s) for s in shares if s) / np.log(2)
        assert float(row[f"{name}/entropy"]) == pytest.approx(entropy, abs=1e-5)
        assert float(row[f"{name}/max_load"]) == pytest.approx(2 * shares.max())
        assert float(row["examples_per_second"]) == pytest.approx(4 * float(row["steps_per_second"]))
        assert float(row["tokens_per_second"]) == pytest.approx(16 * float(row["steps_per_second"]))
        assert float(row["process_memory"]) > 50 and 0 < float(row["model_flops_utilisation"]) < 10
        assert np.isfinite(float(row["loss"]))
    assert float(rows[-1]["gradient_norm"]) == pytest.approx(float(model.optimizer.gradient_norm))
    assert history["gradient_norm"] == [pytest.approx(float(model.optimizer.gradient_norm))]
    assert list((tmp_path / "board").iterdir())
    usage.heat_map(tmp_path / "experts.png")
    assert (tmp_path / "experts.png").stat().st_size > 1000 and np.array(usage.history[name]).shape == (3, 2)


def test_an_expert_without_tokens_is_dead():
    usage = training.ExpertUsage()
    model = small_model(num_experts=4, num_experts_per_token=1)
    usage.begin(model)
    layer = model.backbone.blocks[1].feed_forward
    layer.usage.assign([0.5, 0.5, 0.0, 0.0])
    values = usage.measure(model, 1, 1.0)
    assert values["block_1/feed_forward/dead"] == 2
    assert values["block_1/feed_forward/max_load"] == 2
    assert values["block_1/feed_forward/entropy"] == pytest.approx(0.5, abs=1e-5)


def test_a_schedule_is_not_compiled_at_each_reading():
    class Halved(keras.optimizers.schedules.LearningRateSchedule):
        calls = 0

        def __call__(self, step):
            self.calls += 1
            return 1.0 / (1.0 + keras.ops.cast(step, "float32"))

    schedule, model, probe = Halved(), perceptron(), training.LearningRate()
    model.compile(keras.optimizers.SGD(schedule))
    probe.begin(model)
    schedule.calls = 0
    for step in range(4):
        model.optimizer.iterations.assign(step)
        assert probe.measure(model, 1, 1.0)["learning_rate"] == pytest.approx(1 / (1 + step))
    assert schedule.calls <= (1 if _backend.compilation.has_jit() else 4)


@full("jax")
def test_a_csv_file_is_continued_or_a_new_one_is_started(tmp_path):
    file = tmp_path / "log.csv"
    for _ in range(2):
        fit([training.Monitor([training.GradientNorm()], csv=file)], steps=3)
    assert len(file.read_text().splitlines()) == 3
    fit([training.Monitor([training.LearningRate()], csv=file)], steps=3)
    assert len(file.read_text().splitlines()) == 3
    assert "learning_rate" in (tmp_path / "log-1.csv").read_text()


def test_epochs_of_one_step_and_metrics_of_several_values_are_written(tmp_path):
    x, y = batch()
    model = perceptron()
    optimizer = training.optimizer(model, 10, gradient_accumulation_steps=2)
    f1 = keras.metrics.F1Score(average=None, name="f1")
    model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True), metrics=[f1])
    monitor = training.Monitor([training.Throughput(4), training.GradientNorm()], every=1, csv=tmp_path / "log.csv")
    model.fit(x, keras.utils.to_categorical(y, 3), epochs=4, verbose=0, callbacks=[monitor])
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"] and {"f1_0", "f1_1", "f1_2"} <= rows[0].keys()
    assert rows[0]["steps_per_second"] == "nan" and float(rows[1]["steps_per_second"]) > 0
    assert [float(row["gradient_norm"]) > 0 for row in rows] == [False, True, True, True]


def test_probes_name_their_missing_requirements():
    with pytest.raises(ValueError, match="model with experts.*Received.*no MoELayer"):
        fit([training.Monitor([training.ExpertUsage()])])
    model = perceptron()
    model.compile("adam", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="keeps the norm.*Received: Adam.*training.optimizer"):
        model.fit(*batch(), verbose=0, callbacks=[training.Monitor([training.GradientNorm()])])
    with pytest.raises(ValueError, match="at least one measurement"):
        training.ExpertUsage().heat_map("never.png")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"needs tensorboardX.*Received.*keras-jamba\[monitoring\]"):
        training.Monitor([], tensorboard=tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA L40S", "float32", 91.6e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
    ],
)
def test_devices_are_found_by_their_names(monkeypatch, name, dtype, rate):
    monkeypatch.setattr(_devices._backend.device, "device_name", lambda: name)
    assert _devices.peak_flops(dtype) == rate


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="must have a bfloat16 entry for the device. Received: 'CPU'.*measured"):
        training.Utilisation(1e6)
    with pytest.raises(ValueError, match="positive number.*Received: peak='fast'"):
        training.Utilisation(1e6, peak="fast")


@full("jax")
def test_the_trace_of_the_backend_is_written(tmp_path):
    fit([training.Profile(tmp_path / "trace", first=2, steps=2)], steps=5)
    written = [path for path in (tmp_path / "trace").rglob("*") if path.is_file()]
    assert written and sum(path.stat().st_size for path in written) > 1000


@full("jax")
def test_the_largest_batch_is_found_and_the_model_stays_unchanged(monkeypatch):
    x, y = batch()
    model = compiled(perceptron())
    model.train_on_batch(x, y)
    variables = [*model.variables, *model.optimizer.variables]
    before = [keras.ops.convert_to_numpy(v).copy() for v in variables]
    tried, step = [], model.train_on_batch

    def limited(x, y):
        tried.append(len(x))
        if len(x) > 21:
            raise MemoryError
        return step(x, y)

    monkeypatch.setattr(model, "train_on_batch", limited)
    found = training.largest_batch(model, (x[:1], y[:1]))
    assert 19 <= found <= 21 and max(tried) == 32 and found in tried
    for variable, old in zip(variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), old)
    assert training.largest_batch(model, (x[:1], y[:1]), at_most=2) == 2


def test_a_memory_limit_is_respected_and_other_errors_are_raised(monkeypatch):
    x, y = batch()
    model = compiled(perceptron())
    assert training.largest_batch(model, (x[:1], y[:1]), memory=1) == 0
    with pytest.raises(ValueError, match="not compiled"):
        training.largest_batch(perceptron(), (x[:1], y[:1]))

    def broken(*_):
        raise ArithmeticError("no memory of it")

    monkeypatch.setattr(model, "train_on_batch", broken)
    with pytest.raises(ArithmeticError):
        training.largest_batch(model, (x[:1], y[:1]))

"""Checkpoint: a killed training resumes within an epoch and ends like an uninterrupted one."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny_run
from checks import full, once

from keras_jamba import _backend, training
from keras_jamba.training.checkpointing import _saves, _snapshots

BACKEND = keras.backend.backend()
SCRIPT = Path(tiny_run.__file__)


def run(folder, *step):
    """Runs the script in its own process and returns the exit code."""
    done = subprocess.run([sys.executable, SCRIPT, folder, *map(str, step)], capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def end(folder):
    """Returns the arrays that a run wrote at its end."""
    with np.load(Path(folder) / "end.npz") as file:
        return [file[f"arr_{i}"] for i in range(len(file.files))]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, e in zip(found, expected, strict=True):
        if BACKEND == "tensorflow":
            np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(a, e)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(folder) == 0
    return end(folder)


@full()
def test_a_killed_run_ends_with_the_weights_and_logs_of_a_complete_one(uninterrupted, tmp_path):
    # Steps within the first and the last epoch. benchmarks/training/resuming.py kills at 20 random steps.
    for step in (7, 29):
        assert run(tmp_path, step) == -signal.SIGKILL
    assert run(tmp_path) == 0
    assert_equal(end(tmp_path), uninterrupted)
    assert _snapshots.steps(tmp_path) == [30, 33]
    # Another run has no step left to take.
    assert run(tmp_path) == 0
    assert_equal(end(tmp_path)[:-1], uninterrupted[:-1])


@full()
@once
def test_a_save_interrupted_by_kill_9_leaves_the_previous_save(tmp_path):
    program = (
        "import numpy as np; from keras_jamba.training.checkpointing import _snapshots\n"
        f"for i in range(10**6):\n"
        f"  _snapshots.write({str(tmp_path)!r}, i, [_snapshots.as_single_shard(np.full(10**5, i))], {{'step': i}})\n"
        f"  _snapshots.remove_before({str(tmp_path)!r}, i - 1)"
    )
    rng = np.random.default_rng(0)
    environment = os.environ | {"KERAS_BACKEND": BACKEND}
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program], env=environment)
        before = set(_snapshots.steps(tmp_path))
        while set(_snapshots.steps(tmp_path)) <= before or len(_snapshots.steps(tmp_path)) < 2:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        for step in _snapshots.steps(tmp_path):
            arrays, state = _snapshots.read(tmp_path, step)
            assert _snapshots.is_as_written(tmp_path, step)
            assert state["step"] == step and (arrays[0].read() == step).all()


@pytest.mark.parametrize("is_killed", [False, True])
def test_an_interrupted_replacement_of_a_save_leaves_the_old_one(tmp_path, monkeypatch, is_killed):
    _snapshots.write(tmp_path, 3, [_snapshots.as_single_shard(np.arange(3))], {"saved": "first"})
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        # A killed process restores nothing.
        if len(calls) == 2 or is_killed and len(calls) > 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        _snapshots.write(tmp_path, 3, [_snapshots.as_single_shard(np.arange(4))], {"saved": "second"})
    assert (tmp_path / "step_00000003").exists() != is_killed
    assert _snapshots.steps(tmp_path) == [3] and _snapshots.read_state(tmp_path, 3)["saved"] == "first"
    _snapshots.write(tmp_path, 3, [_snapshots.as_single_shard(np.arange(4))], {"saved": "second"})
    assert _snapshots.read_state(tmp_path, 3)["saved"] == "second" and len(list(tmp_path.iterdir())) == 1


def test_bfloat16_scalars_and_empty_arrays_are_restored_exactly(tmp_path):
    import ml_dtypes

    arrays = [np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), np.array(7, "int64"), np.zeros((0, 2), "float32")]
    _snapshots.write(tmp_path, 1, map(_snapshots.as_single_shard, arrays), {})
    found, _ = _snapshots.read(tmp_path, 1)
    for saved, e in zip(found, arrays, strict=True):
        a = saved.read()
        assert a.dtype == e.dtype and a.shape == e.shape and (a == e).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "bool"])
def test_a_variable_of_any_dtype_is_restored_from_its_shards(tmp_path, dtype):
    make = lambda x: keras.Variable(keras.ops.cast(x, dtype), dtype=dtype, trainable=False)  # noqa: E731
    variable, other = make(np.arange(6).reshape(2, 3)), make(np.zeros((2, 3)))
    _snapshots.write(tmp_path, 1, [(variable.shape, _backend.processes.local_shards(variable))], {})
    (saved,), _ = _snapshots.read(tmp_path, 1)
    assert saved.read().dtype.name == dtype
    _backend.processes.assign_from_shards(other, saved.read)
    np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(v) for v in (other, variable)))


@once
def test_a_slice_of_an_array_is_assembled_from_its_shards(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.random((6, 5, 4), "float32")
    slices = [(slice(a, b), slice(c, d), slice(None)) for a, b in ((0, 2), (2, 6)) for c, d in ((0, 3), (3, 5))]
    for i, own in enumerate((slices[:3], slices[3:])):
        shards = [(tuple(s.start or 0 for s in index), x[index]) for index in own]
        _snapshots.write(tmp_path / f"process_{i}", 1, [(x.shape, shards)], {"variables": 1, "processes": 2})
    assert _saves.last(tmp_path, 1) == (1, 2)
    folders = _saves.folders(tmp_path, 2)
    ((saved,), _, _) = _saves.read(folders, 1, index=0)
    np.testing.assert_array_equal(saved.read(), x)
    for _ in range(50):
        bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in x.shape]
        index = tuple(slice(int(a), int(b)) for a, b in bounds)
        np.testing.assert_array_equal(saved.read(index), x[index])
    with pytest.raises(ValueError, match="must cover all of it. Received: step 1.*variable 0.*Remove this step"):
        _saves.read(folders[:1], 1, index=0)


@once
def test_writing_and_reading_hold_at_most_two_shards(tmp_path):
    size = 2**18
    shards = lambda: (((i * size,), np.full(size, i, "float32")) for i in range(16))  # noqa: E731
    tracemalloc.start()
    try:
        _snapshots.write(tmp_path, 1, [((16 * size,), shards())], {})
        assert size * 4 < tracemalloc.get_traced_memory()[1] < 3 * size * 4
        tracemalloc.reset_peak()
        (saved,), _ = _snapshots.read(tmp_path, 1)
        found = (saved.read((slice(i * size, (i + 1) * size),)) for i in range(16))
        assert all((array == i).all() for i, array in enumerate(found))
        assert tracemalloc.get_traced_memory()[1] < 3 * size * 4
    finally:
        tracemalloc.stop()


def perceptron():
    """Returns a model that compiles fast. The model of the runs above covers every kind of state."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dropout(0.1), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    optimizer = training.optimizer(model, 33, learning_rate=1e-2, use_ema=True)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def fit(folder, model=None, data=None, epochs=1, callbacks=(), after=(), **arguments):
    model, data = model or perceptron(), data or tiny_run.batches()
    checkpoint = training.Checkpoint(folder, data, **dict(every=100) | arguments)
    model.fit(data, epochs=epochs, verbose=0, callbacks=[*callbacks, checkpoint, *after])
    return model


def steps_of(model):
    return int(keras.ops.convert_to_numpy(model.optimizer.iterations))


class StopTraining(keras.callbacks.Callback):
    """Callback that stops the training within an epoch, or at its end."""

    def __init__(self, batch=None):
        super().__init__()
        self.batch = batch

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if self.batch is None:
            self.model.stop_training = True


@full("jax")
@pytest.mark.parametrize(
    ("stops", "steps"), [(dict(callbacks=[StopTraining(4)]), 5), (dict(after=[StopTraining()]), 11)]
)
def test_a_training_stopped_by_a_callback_stays_stopped(tmp_path, stops, steps):
    model = fit(tmp_path, epochs=3, **stops)
    assert steps_of(model) == steps and _snapshots.steps(tmp_path) == [steps]
    again = fit(tmp_path, epochs=3)
    assert steps_of(again) == steps
    for a, e in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, e)))


@full("jax")
def test_a_finished_training_does_not_affect_the_next_fit(tmp_path):
    fit(tmp_path / "first")
    model = fit(tmp_path / "first")
    assert steps_of(model) == 11
    data = tiny_run.batches()
    model.fit(data, epochs=1, verbose=0)
    assert steps_of(model) == 22
    with pytest.raises(
        ValueError, match="must not have trained beyond the save. Received: a model after 22 steps, and step 11"
    ):
        fit(tmp_path / "first", model=model)


@full("jax")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_weights_that_are_not_finite_replace_no_save(tmp_path, caplog, monkeypatch, elsewhere):
    model = fit(tmp_path, every=5, epochs=1)
    assert _snapshots.steps(tmp_path) == [10, 11]
    if elsewhere:  # in the shards of another process
        monkeypatch.setattr(_backend.processes, "all_gather_int", lambda number: [number, False])
    else:
        model.trainable_variables[0].assign(model.trainable_variables[0] * np.nan)
    checkpoint = training.Checkpoint(tmp_path, tiny_run.batches())
    checkpoint.set_model(model)
    checkpoint._done = 7
    checkpoint._save()
    assert _snapshots.steps(tmp_path) == [10, 11] and "not finite" in caplog.text


def test_saves_of_two_runs_are_not_combined(tmp_path, caplog):
    for index, run in enumerate((3, 4)):
        _snapshots.write(tmp_path / f"process_{index}", 7, [], {"processes": 2, "variables": 0, "run": run})
    assert _saves.last(tmp_path, 2) is None and "starts from the beginning" in caplog.text


def test_processes_that_see_different_saves_raise_an_error(tmp_path, monkeypatch):
    fit(tmp_path)
    monkeypatch.setattr(_backend.processes, "all_gather_int", lambda number: [number, -1])
    with pytest.raises(
        ValueError, match=r"must see the same saves. Received: the steps \[11, -1\].*disk that all share"
    ):
        fit(tmp_path)


@full()
def test_a_save_of_two_processes_resumes_in_one_within_an_epoch(tmp_path, caplog):
    for i in range(2):
        fit(tmp_path, data=tiny_run.batches(shard=(i, 2)), every=4, callbacks=[StopTraining(5)])
        shutil.rmtree(_snapshots.place_of(tmp_path / f"process_{i}", 6))  # the save at the stop
    model = fit(tmp_path, after=[StopTraining(0)])
    assert steps_of(model) == 5 and "save of 2 process(es) continues in 1" in caplog.text
    assert [len(_snapshots.steps(place)) for place in (tmp_path, tmp_path / "process_0")] == [1, 1]


@once
def test_a_save_of_format_1_is_read(tmp_path):
    arrays = [np.arange(6, dtype="float32").reshape(2, 3), np.array(7, "int32")]
    place = tmp_path / "step_00000003"
    place.mkdir()
    np.savez(place / "arrays.npz", *(x.reshape(-1).view("uint8") for x in arrays))
    sha256 = hashlib.sha256((place / "arrays.npz").read_bytes()).hexdigest()
    specs = [[list(x.shape), x.dtype.name] for x in arrays]
    (place / "state.json").write_text(json.dumps({"format": 1, "sha256": sha256, "arrays": specs, "variables": 1}))
    assert _saves.last(tmp_path, 1) == (3, 1) and _saves.damaged([tmp_path], 3) is None
    (variable,), (own,), _ = _saves.read([tmp_path], 3, index=0)
    np.testing.assert_array_equal(variable.read(), arrays[0])
    np.testing.assert_array_equal(own.read(), arrays[1])


@full("jax")
def test_processes_resume_from_the_last_save_that_all_of_them_have(tmp_path):
    data = [tiny_run.batches(shard=(index, 2)) for index in range(2)]
    for index, epochs in ((0, 2), (1, 1)):
        fit(tmp_path, data=data[index], epochs=epochs)
    assert [_snapshots.steps(tmp_path / f"process_{i}") for i in range(2)] == [[22], [11]]
    fit(tmp_path, data=data[0], epochs=1)  # no save is common to both: starts from the beginning
    assert _snapshots.steps(tmp_path / "process_0") == [11, 22]
    model = perceptron()
    checkpoint = training.Checkpoint(tmp_path, data[0])
    checkpoint.set_model(model)
    checkpoint.set_params({"epochs": 2})
    checkpoint.on_train_begin()
    assert steps_of(model) == 11


def test_a_mismatched_or_damaged_save_is_refused(tmp_path):
    fit(tmp_path)
    other = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    other.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="model, the optimizer and the metrics.*Received: .*first that differs"):
        fit(tmp_path, model=other)
    with pytest.raises(ValueError, match="data that it was saved with.*Received.*'seed': 6.*where.*'seed': 5"):
        fit(tmp_path, data=tiny_run.batches(seed=6))
    with pytest.raises(ValueError, match="data that it was saved with.*Received.*'shuffle': False.*where"):
        fit(tmp_path, data=tiny_run.batches(shuffle=False))
    (save,) = [path for path in tmp_path.iterdir() if path.name.startswith("step_")]
    content = bytearray((save / _snapshots.ARRAYS).read_bytes())
    content[len(content) // 2] ^= 1
    (save / _snapshots.ARRAYS).write_bytes(content)
    with pytest.raises(ValueError, match="must match the sha256.*Received.*step_00000011.*Remove it"):
        fit(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "saves").write_text("a log")
    model = perceptron()
    with pytest.raises(NotADirectoryError, match="need a folder. Received: a file. Pass another folder.*saves'"):
        fit(tmp_path / "saves", model=model)
    assert steps_of(model) == 0


def test_arrays_that_one_process_cannot_read_stop_all_of_them_before_the_first_step(tmp_path, monkeypatch):
    fit(tmp_path)
    model = perceptron()
    given = []

    def is_unreadable(places, step):
        raise PermissionError(errno.EACCES, "Permission denied", "arrays.bin")

    # Only this number tells the others, which would wait for this process.
    monkeypatch.setattr(_backend.processes, "all_gather_int", lambda number: given.append(number) or [number])
    with monkeypatch.context() as patch, pytest.raises(PermissionError, match="arrays.bin"):
        patch.setattr(_saves, "damaged", is_unreadable)
        fit(tmp_path, model=model)
    monkeypatch.setattr(_backend.processes, "all_gather_int", lambda number: [number, number or given[-1]])
    with pytest.raises(OSError, match="must read step 11. Received: an OSError in another one"):
        fit(tmp_path, model=model)
    assert steps_of(model) == 0 and _snapshots.steps(tmp_path) == [11]


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="function of the step.*Received: data=tuple.*Batches"):
        training.Checkpoint(tmp_path, (1, 2))
    with pytest.raises(ValueError, match="every must be.*Received: every=0"):
        training.Checkpoint(tmp_path, tiny_run.batches(), every=0)
    unbuilt = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3)])
    unbuilt.compile("sgd", "sparse_categorical_crossentropy")
    checkpoint = training.Checkpoint(tmp_path, tiny_run.batches())
    checkpoint.set_model(unbuilt)
    with pytest.raises(ValueError, match="must have its variables.*Received.*built=False.*Build it"):
        checkpoint.on_train_begin()


@full("jax")
@pytest.mark.parametrize("given", ["equal batches", "arrays"])
def test_other_data_in_fit_than_in_the_checkpoint_is_refused_and_nothing_is_saved(tmp_path, given):
    model, data = tiny_run.model(), tiny_run.batches()
    checkpoint = training.Checkpoint(tmp_path, data, every=1)
    x, y = data.batch(0)[:2]
    arguments = (tiny_run.batches(),) if given == "equal batches" else (x, y)
    with pytest.raises(ValueError, match="must have the same data object.*Pass one object to both"):
        model.fit(*arguments, epochs=1, verbose=0, callbacks=[checkpoint])
    assert list(tmp_path.iterdir()) == []

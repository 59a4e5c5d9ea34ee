"""Loading of checkpoints: mapped tensors, and models without initial values."""

import shutil
import threading

import golden_jamba
import keras
import ml_dtypes
import numpy as np
import pytest
from checks import numpy, once
from safetensors.numpy import load_file, save_file

import keras_jamba
from keras_jamba import _backend, _keras_internals
from keras_jamba.converters import safetensors_folder
from keras_jamba.converters.safetensors_folder import SafetensorsFolder

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(golden_jamba.FOLDER / "moe", tmp_path / "moe")


def drawn(shape, dtype):
    values = np.random.default_rng(0).standard_normal(shape)
    return values.astype(getattr(ml_dtypes, dtype) if "8" in dtype or dtype == "bfloat16" else dtype)


@once
@pytest.mark.parametrize("dtype", FLOATS)
def test_mapped_tensors_equal_those_that_were_written(tmp_path, dtype):
    given = {name: drawn(shape, "float32") for name, shape in dict(a=(3, 5), b=(), c=(0, 4), d=(7,)).items()}
    given = {name: np.asarray(x).astype(drawn((1,), dtype).dtype) for name, x in given.items()}
    save_file(given, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with SafetensorsFolder(tmp_path, lambda name, shape: None) as files:
        # A file that replaces it while it is read has no effect.
        save_file({"a": np.zeros(1)}, tmp_path / "other")
        (tmp_path / "other").replace(tmp_path / "model.safetensors")
        for name, expected in given.items():
            found = files.read(name)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            np.testing.assert_array_equal(found.astype("float32"), expected.astype("float32"))


@once
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_found_in_every_block(monkeypatch, dtype, value):
    monkeypatch.setattr(safetensors_folder, "_BLOCK", 4)
    finite = drawn((3, 4), dtype)
    assert safetensors_folder._is_finite(finite) and safetensors_folder._is_finite(finite.T)
    largest = np.full((3,), ml_dtypes.finfo(finite.dtype).max, finite.dtype)
    assert safetensors_folder._is_finite(largest) and safetensors_folder._is_finite(-largest)
    if dtype == "float8_e4m3fn" and not np.isnan(value):
        return  # this dtype has no infinity
    for place in range(finite.size):
        damaged = finite.copy()
        damaged.flat[place] = value
        assert not safetensors_folder._is_finite(damaged)


def test_no_initializer_draws_numbers_for_weights_of_a_checkpoint(folder, monkeypatch):
    expected = keras_jamba.JambaCausalLM.from_preset(folder)

    def refused(*args, **kwargs):
        raise AssertionError("an initializer drew numbers")

    for name in ("uniform", "normal", "truncated_normal"):
        monkeypatch.setattr(keras.random, name, refused)
        monkeypatch.setattr(keras.src.initializers.random_initializers.random, name, refused)
    found = keras_jamba.JambaCausalLM.from_preset(folder)
    for a, b in zip(expected.weights, found.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))


@pytest.mark.parametrize("case", ["moe", "mamba1_lm", "proj_bias"])
def test_a_file_that_changes_after_loading_changes_no_weight(tmp_path, case):
    folder = shutil.copytree(golden_jamba.FOLDER / case, tmp_path / case)
    file = folder / "model.safetensors"
    model = keras_jamba.JambaCausalLM.from_preset(folder)
    before = [numpy(v).copy() for v in model.weights]
    size = int.from_bytes(file.read_bytes()[:8], "little") + 8
    with open(file, "r+b") as stream:
        stream.seek(size)
        stream.write(b"\0" * (file.stat().st_size - size))
    for variable, expected in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), expected)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_without_a_value_in_the_checkpoint_keep_their_initial_values(folder, quantization):
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaClassifier.from_preset(folder, num_classes=3, quantization=quantization)
    head = numpy(model.head.kernel)
    assert np.isfinite(head).all() and 0 < np.abs(head).max() < 2
    fresh = keras_jamba.JambaClassifier.from_preset(folder, load_weights=False, num_classes=3)
    expected = {v.path: numpy(v) for v in fresh.weights if v.path.endswith(("usage", "drop_rate", "aux_loss"))}
    found = {v.path: numpy(v) for v in model.weights if v.path in expected}
    assert found.keys() == expected.keys() and len(found) > 3
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x)


def test_weights_of_a_model_that_the_loaded_one_holds_have_initial_values(folder):
    class Taught(keras_jamba.JambaCausalLM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            # Keras does not track it. Its variables have the paths of the outer model's.
            vars(self)["teacher"] = keras_jamba.JambaCausalLM(*args, **{**kwargs, "name": self.name})

    Taught.__name__ = "JambaCausalLM"
    model = Taught.from_preset(folder)
    expected = keras_jamba.JambaCausalLM.from_preset(folder)
    for a, b in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))
    teacher = vars(model)["teacher"]
    norm = teacher.backbone.final_norm.scale
    np.testing.assert_array_equal(numpy(norm), np.ones(norm.shape))
    kernel = numpy(teacher.backbone.blocks[0].mixer.in_proj.kernel)
    assert 0.01 < kernel.std() < 1 and abs(kernel.mean()) < 0.1


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_variable_takes_an_array_of_every_dtype_and_layout(dtype):
    variable = keras.Variable("zeros", shape=(3, 5), dtype="float32")
    x = drawn((3, 5), dtype)
    for array in (x, np.ascontiguousarray(x.T).T, drawn((5, 6), dtype).T[::2][:3]):
        _backend.tensors.fill(variable, array)
        np.testing.assert_array_equal(numpy(variable), array.astype("float32"))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="about arrays of JAX")
def test_loaded_weights_are_bound_to_no_device(folder):
    model = keras_jamba.JambaCausalLM.from_preset(folder)
    assert not any(v.value.committed for v in model.weights)


def test_a_failed_load_leaves_later_models_their_initial_values(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] * np.float32(np.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Weights must be finite numbers. Received: "):
        keras_jamba.JambaCausalLM.from_preset(folder)
    assert not vars(_keras_internals._initialization)
    layer = keras.layers.Dense(3, bias_initializer="ones")
    layer.build((None, 2))
    np.testing.assert_array_equal(numpy(layer.bias), np.ones(3))


def test_a_model_that_another_thread_builds_meanwhile_has_initial_values():
    found = []
    with _keras_internals.without_initial_values(lambda path: True):
        thread = threading.Thread(target=lambda: found.append(keras.Variable("ones", shape=(3,), dtype="float32")))
        thread.start()
        thread.join()
    np.testing.assert_array_equal(numpy(found[0]), np.ones(3))


def test_a_variable_that_is_filled_later_runs_no_initializer_unless_nothing_fills_it():
    calls = []

    def initializer(shape, dtype=None):
        calls.append(shape)
        return keras.ops.ones(shape, dtype)

    with _keras_internals.without_initial_values(lambda path: path == "later") as skipped:
        later = keras.Variable(initializer, shape=(2,), dtype="float32", name="later")
        assert calls == [] and skipped == [(later, initializer)]
        now = keras.Variable(initializer, shape=(3,), dtype="float32", name="now")
        assert calls == [(3,)] and tuple(now.shape) == (3,)
    _keras_internals.initialize_others(skipped, [later])
    assert calls == [(3,)]
    _keras_internals.initialize_others(skipped, [now])
    assert calls == [(3,), (2,)]
    np.testing.assert_array_equal(numpy(later), np.ones(2))

"""Every private attribute of Keras that the package uses does what `_keras_internals` says, in the installed Keras.

`make test-nightly` runs this file with keras-nightly.
"""

import contextlib
import inspect
import io
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from keras.src.backend.common.global_state import GLOBAL_STATE_TRACKER
from keras.src.utils.tracking import DotNotTrackScope

from keras_jamba import _keras_internals as internals

BACKEND = keras.backend.backend()


def names(found):
    return [each.name for each in found]


def nested_model():
    inner = keras.Sequential([keras.layers.Dense(2, name="first"), keras.layers.Dense(2, name="second")], name="inner")
    model = keras.Sequential([keras.Input((2,)), inner, keras.layers.BatchNormalization(name="norm")], name="outer")
    return model, inner


def test_sublayers_are_found_from_the_outside_in():
    model, inner = nested_model()
    found = [name for name in names(internals.sublayers(inner)) if not name.startswith("input")]
    assert found == ["inner", "first", "second"]
    assert {"inner", "first", "second", "norm"} <= set(names(internals.sublayers(model, include_self=False)))
    assert "outer" not in names(internals.sublayers(model, include_self=False))
    assert names(internals.direct_sublayers(inner))[-2:] == ["first", "second"]


def test_own_variables_keep_their_groups_when_a_layer_is_frozen():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 3))
    layer.trainable = False
    trained, others = map(names, internals.own_variables(layer))
    assert trained == ["gamma", "beta"]
    assert others[:2] == ["moving_mean", "moving_variance"]


@pytest.mark.parametrize("layer", [keras.layers.Dense(2), keras.layers.Embedding(4, 2)], ids=["kernel", "embeddings"])
def test_a_weight_is_stored_behind_the_property_of_a_layer(layer):
    name = "kernel" if isinstance(layer, keras.layers.Dense) else "embeddings"
    layer.build((None, 3))
    variable = getattr(layer, name)
    assert internals.stored_weight(layer, name) is variable
    internals.store_weight(layer, name, variable)
    assert getattr(layer, name) is variable


def test_a_layer_that_is_marked_as_quantized_ignores_its_policy():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    internals.mark_quantized(layer)
    layer.dtype_policy = "int8_from_float32"
    assert keras.backend.standardize_dtype(layer._kernel.dtype) == "float32"


def test_a_built_layer_accepts_new_variables_only_while_unlocked():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    with pytest.raises(ValueError, match="cannot add"):
        layer.add_weight((1,), name="late")
    with internals.unlocked(layer):
        layer.late = layer.add_weight((1,), name="late")
    assert "late" in names(layer.weights)
    with pytest.raises(ValueError, match="cannot add"):
        layer.add_weight((1,), name="later")


@pytest.mark.skipif(BACKEND != "torch", reason="parameters are PyTorch's")
def test_tracked_torch_parameters_include_new_variables():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    layer.kernel.trainable = False
    with internals.unlocked(layer):
        layer.late = layer.add_weight((1,), name="late")
    internals.track_torch_parameters(layer)
    assert len(list(layer.parameters())) == 3


def test_a_layer_is_notified_after_its_build():
    class Notified(internals.PostBuildHook, keras.layers.Dense):
        def _on_built(self):
            self.reported = self.kernel.shape

    layer = Notified(2)
    layer(np.ones((1, 3), "float32"))
    assert layer.reported == (3, 2)


def test_the_tensor_of_a_variable_is_read_and_released():
    variable = keras.Variable([1.0, 2.0])
    assert internals.stored_tensor(variable) is variable.value
    internals.release_tensor(variable)
    assert variable._value is None


def test_variables_are_read_in_the_dtype_of_the_scope():
    variable = keras.Variable([1.0], dtype="float32")
    dtype = lambda: keras.backend.standardize_dtype(ops.convert_to_tensor(variable).dtype)  # noqa: E731
    with internals.autocast("bfloat16"):
        assert dtype() == "bfloat16"
        with internals.autocast(None):
            assert dtype() == "float32"


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of PyTorch; runs on torch")
def test_torch_device_names_the_device_of_new_tensors():
    assert internals.torch_device() == ops.zeros(1).device.type
    with keras.device("meta"):
        assert internals.torch_device() == "meta"


def test_a_tensor_carries_its_mask():
    x, mask = ops.ones((1, 2)), ops.ones((1, 2), "bool")
    assert internals.get_keras_mask(x) is None
    internals.set_keras_mask(x, mask)
    assert internals.get_keras_mask(x) is mask
    assert internals.get_keras_mask(keras.layers.Dense(1)(x)) is not None


class AddsLoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(ops.sum(x))
        return x


def test_losses_of_the_last_call_are_cleared():
    model = keras.Sequential([keras.Input((2,)), AddsLoss()])
    model(np.ones((1, 2), "float32"))
    assert len(model.losses) == 1
    internals.clear_losses(model)
    assert model.losses == []


def test_arguments_of_compile_are_found_with_their_functions():
    def own(y_true, y_pred):
        return ops.mean(y_pred, axis=-1)

    model, _ = nested_model()
    model.compile("sgd", keras.losses.MeanSquaredError(), metrics=["mae", own])
    model.fit(np.ones((2, 2)), np.ones((2, 2)), verbose=0)
    found = internals.given_to_compile(model)
    assert own in found
    assert keras.losses.mean_squared_error in found
    assert "mae" not in found


def test_fit_begins_at_the_epoch_of_set_initial_epoch():
    model, _ = nested_model()
    model.compile("sgd", "mse")
    seen = []
    model.fit(np.ones((2, 2)), np.ones((2, 2)), epochs=1, verbose=0)

    class SetEpoch(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            internals.set_initial_epoch(self.model, 2)

        def on_epoch_begin(self, epoch, logs=None):
            seen.append(epoch)

    model.fit(np.ones((2, 2)), np.ones((2, 2)), epochs=4, callbacks=[SetEpoch()], verbose=0)
    assert seen == [2, 3]


def test_losses_and_metrics_say_whether_they_expect_probabilities():
    probabilities = [keras.metrics.AUC(), keras.metrics.BinaryCrossentropy()]
    logits = [keras.metrics.AUC(from_logits=True), keras.metrics.BinaryCrossentropy(from_logits=True)]
    assert list(map(internals.expects_probabilities, probabilities)) == [True, True]
    assert list(map(internals.expects_probabilities, [*logits, keras.metrics.Mean()])) == [False] * 3


class Hooked(internals.SymbolicBuildHook, keras.Sequential):
    def _symbolic_build_data(self, iterator):
        self.received = iterator
        return iterator


@pytest.mark.skipif(BACKEND != "torch", reason="on other backends only some versions of Keras build symbolically")
def test_a_model_receives_the_data_before_the_symbolic_build():
    model = Hooked([keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
    assert model.received is not None


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a hook of TensorFlow")
@pytest.mark.parametrize("replicas", [False, True])
def test_a_replicated_model_receives_the_data_before_its_first_step(replicas):
    import tensorflow as tf

    class Model(internals.TensorFlowReplicasHook, Hooked):
        def _replicas_data(self, iterator):
            return self._symbolic_build_data(iterator)

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope() if replicas else contextlib.nullcontext():
        model = Model([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
    assert hasattr(model, "received") == replicas


@pytest.mark.skipif(BACKEND != "jax", reason="hooks of JAX")
def test_keras_calls_the_trainer_hooks_on_jax():
    class Model(internals.JaxTrainerHooks, keras.Sequential):
        state, synced, seen = None, True, ()

        @property
        def _loop_state(self):
            return type(self).state

        @_loop_state.setter
        def _loop_state(self, state):
            type(self).state = state
            type(self).seen += ("state",)

        @property
        def _loop_state_synced(self):
            return type(self).synced

        @_loop_state_synced.setter
        def _loop_state_synced(self, synced):
            type(self).synced = synced

        def _first_loop_state(self, **wanted):
            type(self).seen += tuple(sorted(name for name, value in wanted.items() if value))
            return super()._first_loop_state(**wanted)

        def _function_of_iterator(self, step_function, concatenate_outputs=False):
            type(self).seen += ("function",)
            return super()._function_of_iterator(step_function, concatenate_outputs)

    model = Model([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    before = ops.convert_to_numpy(model.weights[0])
    if "out_shardings" in inspect.signature(keras.Sequential._make_function).parameters:
        with pytest.raises(RuntimeError, match="Received: keras 3.*Install 'keras>=3.15.1,<3.16'"):
            model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
        return
    model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
    assert {"function", "state", "trainable_variables", "optimizer_variables"} <= set(Model.seen)
    assert not np.array_equal(before, ops.convert_to_numpy(model.weights[0]))


def test_an_export_of_keras_comes_from_its_export_modules():
    module = inspect.getmodule(inspect.unwrap(keras.export.ExportArchive.write_out)).__name__
    assert internals.is_keras_export(module)
    assert not internals.is_keras_export("keras.src.models.model")


class Data(keras.utils.PyDataset):
    adapter = None

    @property
    def workers(self):
        self.adapter = internals.asking_adapter(self, depth=1) or self.adapter
        return internals.dataset_workers(self)

    @workers.setter
    def workers(self, value):
        self._workers = value

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return np.ones((2, 2)), np.ones((2, 2))


def test_the_adapter_that_reads_the_workers_of_a_dataset_is_found():
    data, (model, _) = Data(workers=1), nested_model()
    assert data.workers == 1
    assert data.adapter is None
    model.compile("sgd", "mse")
    model.fit(data, shuffle=True, verbose=0)
    assert data.adapter.shuffle is True


def test_the_layout_map_of_a_distribution_is_found():
    assert internals.layout_map(None) is None
    if BACKEND == "jax":
        mesh = keras.distribution.DeviceMesh((1,), ["batch"], devices=keras.distribution.list_devices()[:1])
        layouts = keras.distribution.LayoutMap(mesh)
        distribution = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
        assert internals.layout_map(distribution) is layouts


def test_weights_are_saved_like_those_of_keras(tmp_path):
    model, _ = nested_model()
    internals.save_weights(model, tmp_path / "a.weights.h5")
    other, _ = nested_model()
    other.load_weights(tmp_path / "a.weights.h5")
    for a, b in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


def test_a_model_larger_than_the_free_memory_is_saved_without_hdf5_on_the_disk(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    opened, file_of = [], h5py.File
    monkeypatch.setattr("keras.src.saving.saving_lib.is_memory_sufficient", lambda model: False)
    monkeypatch.setattr(h5py, "File", lambda place, **given: (opened.append(place), file_of(place, **given))[1])
    internals.save_archive(model, tmp_path / "a.keras")
    assert [type(place) for place in opened] == [io.BytesIO]
    opened.clear()
    model.save(tmp_path / "b.keras")  # the same without the hook
    assert len(opened) == 1 and isinstance(opened[0], Path)
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


@pytest.mark.parametrize(
    "scope",
    [
        lambda: keras.name_scope("left"),
        lambda: keras.RematScope(),
        lambda: keras.StatelessScope(),
        lambda: keras.SymbolicScope(),
        lambda: internals.autocast("float16"),
        lambda: keras.saving.custom_object_scope({"left": object}),
        lambda: keras.device("cpu:0"),
        lambda: DotNotTrackScope(),
    ],
)
def test_scopes_that_an_interrupt_leaves_open_are_closed(scope):
    with keras.name_scope("outer"):
        before = scope_state()
        with pytest.raises(KeyboardInterrupt), internals.restored_scopes():
            scope().__enter__()
            raise KeyboardInterrupt
        assert scope_state() == before and keras.Variable(0.0, name="x").path == "outer/x"
    assert keras.Variable(0.0, name="x").path == "x"


def scope_state():
    state = {name: value for name, value in vars(GLOBAL_STATE_TRACKER).items() if value and name != "object_name_uids"}
    return {name: list(value) if isinstance(value, list | dict) else value for name, value in state.items()}

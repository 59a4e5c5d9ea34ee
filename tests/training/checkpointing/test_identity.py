"""A training resumes with the model and the optimizer of its save: shapes alone would accept others."""

import json

import keras
import numpy as np
import pytest
import tiny_run
from checks import once

import keras_jamba
from keras_jamba import _checksums, training
from keras_jamba.training.checkpointing import _identity, _snapshots

# A fixture, which every backend loads, compares the stored names between backends.
pytestmark = once
SIZES = dict(d_model=8, num_layers=1, mamba_ratio=0, moe_frequency=0, num_heads=4, dropout=0.2, drop_path=0.2)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def classifier(learning_rate=1e-2, momentum=0.9, nesterov=False, **changes):
    model = keras_jamba.DHCJamba(3, **dict(image_shape=(8, 8, 1), pixel_range=None, stem="patchify") | SIZES | changes)
    model.compile(keras.optimizers.SGD(learning_rate, momentum, nesterov), LOSS)
    return model


def perceptron(optimizer, cls=keras.Sequential):
    model = cls([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile(optimizer, LOSS)
    return model


def save(folder, model):
    data = tiny_run.batches()
    model.fit(data, epochs=1, verbose=0, callbacks=[training.Checkpoint(folder, data)])
    return model


def resume(folder, model):
    """Loads the save into a model, as `fit` does before its first step."""
    checkpoint = training.Checkpoint(folder, tiny_run.batches())
    checkpoint.set_model(model)
    checkpoint.set_params({"epochs": 2})
    checkpoint.on_train_begin()
    return model


def arrays(model):
    return [keras.ops.convert_to_numpy(v) for v in (*model.variables, *model.optimizer.variables)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saves")
    return folder, save(folder, classifier())


OPTIMIZERS = keras.optimizers


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            lambda: OPTIMIZERS.SGD(momentum=0.9),
            lambda: OPTIMIZERS.RMSprop(),
            "the optimizer RMSprop where SGD was saved",
        ),
        (
            lambda: OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.SGD(momentum=0.9)),
            lambda: OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.RMSprop()),
            "the optimizer RMSprop where SGD was saved",
        ),
        (
            lambda: OPTIMIZERS.RMSprop(momentum=0.9),
            lambda: OPTIMIZERS.RMSprop(centered=True),
            "kernel_average_gradient, 'average_gradient' where 'momentum' was saved",
        ),
        (
            lambda: OPTIMIZERS.Adam(amsgrad=True),
            lambda: OPTIMIZERS.Adam(use_ema=True),
            "kernel_average, 'average' where 'momentum' was saved",
        ),
    ],
    ids=["class", "class within loss scaling", "slots of RMSprop", "slots of Adam"],
)
def test_an_optimizer_with_slots_of_another_meaning_is_refused(tmp_path, before, after, message):
    save(tmp_path, perceptron(before()))
    model = perceptron(after())
    model.optimizer.build(model.trainable_variables)
    start = arrays(model)
    with pytest.raises(ValueError, match=f"that it was saved with. Received: .*{message}.* Make them as they were"):
        resume(tmp_path, model)
    for a, e in zip(arrays(model), start, strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize(
    ("argument", "value", "before"),
    [
        ("num_heads", 2, "4"),
        ("epsilon", 1e-5, "1e-06"),
        ("rope_theta", 500.0, "10000.0"),
        ("use_rope", False, "True"),
        ("attention_window", 2, "None"),
        ("direction", "bidirectional", "'causal'"),
        ("scan_order", "snake", "'row'"),
        ("readout", "last", "'mean'"),
        ("num_layers", 2, "1"),
    ],
)
def test_a_model_with_another_argument_is_refused(saved, argument, value, before):
    message = f"Received: {argument}={value!r} where {argument}={before} was saved.* Make them as they were, or save"
    with pytest.raises(ValueError, match=message):
        resume(saved[0], classifier(**{argument: value}))


def test_a_model_of_another_class_is_refused(tmp_path):
    class Others(keras.Sequential):
        pass

    save(tmp_path, perceptron("sgd"))
    with pytest.raises(ValueError, match="Received: the model Others where Sequential was saved"):
        resume(tmp_path, perceptron("sgd", Others))


@pytest.mark.parametrize(
    "changes",
    [
        dict(dropout=0.1, drop_path=0.1),
        dict(gradient_checkpointing=True),
        dict(dtype="mixed_bfloat16"),
        dict(class_names=["a", "b", "c"]),
        dict(pixel_range=(0, 1), image_shape=(None, None, 1)),
        dict(balance_coefficient=0.5, z_coefficient=0.5),
        dict(num_kv_heads=4, d_ff=32, attention_offset=0),  # the values that None stands for
        dict(learning_rate=5e-3, momentum=0.8, nesterov=True),
        dict(name="another_name"),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_leaves_the_outputs_unchanged_may_change(saved, changes):
    folder, model = saved
    for a, e in zip(arrays(resume(folder, classifier(**changes))), arrays(model), strict=True):
        np.testing.assert_array_equal(a, e)


def test_a_router_is_compared_by_its_class_and_arguments(tmp_path):
    def made(**given):
        router = keras_jamba.layers.Router(**dict(num_experts=4, num_experts_per_token=2) | given)
        return classifier(moe_frequency=1, router=router)

    save(tmp_path, made())
    # Keras gives the second router of a process another name.
    resume(tmp_path, made(balance_coefficient=0.5))
    with pytest.raises(ValueError, match="Received: router=.*'num_experts_per_token': 1.* where router=.*'.*: 2"):
        resume(tmp_path, made(num_experts_per_token=1))


def test_a_save_without_these_entries_resumes_by_its_shapes(tmp_path):
    save(tmp_path, perceptron(keras.optimizers.SGD(momentum=0.9)))
    file = _snapshots.place_of(tmp_path, 11) / _snapshots.STATE
    state = json.loads(file.read_text())
    own = _identity.of_training(perceptron("sgd"), [])
    for name in own:
        del state[name]
    file.write_text(json.dumps(_checksums.sealed(state)))
    model = resume(tmp_path, perceptron(keras.optimizers.SGD(momentum=0.9)))
    assert int(model.optimizer.iterations) == 11 and len(own) == 4


def test_an_argument_without_a_form_in_json_is_not_compared(tmp_path):
    class Model(keras.Sequential):
        def constructor_arguments(self):
            return {"function": np.tanh, "width": 3}

    save(tmp_path, perceptron("sgd", Model))
    assert json.loads((_snapshots.place_of(tmp_path, 11) / _snapshots.STATE).read_text())["arguments"] == {"width": 3}
    resume(tmp_path, perceptron("sgd", Model))

"""Class names: files keep them, predictions use them, and data must match them."""

import json

import keras
import numpy as np
import pytest
from checks import numpy, once
from PIL import Image

import keras_jamba
from keras_jamba import presets
from keras_jamba.training.data import Batches, ImageFolder

# The names are the same on every backend.
pytestmark = once
NAMES = ("cat", "dog", "emu")
TINY = dict(num_classes=3, image_shape=(4, 4, 3), d_model=4, num_layers=1, mamba_ratio=None, d_state=2, downsample=2)
TINY |= dict(stem="patchify", moe_frequency=0)


def model_of(**options):
    model = keras_jamba.DHCJamba(**TINY | options)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def folder_of(path, names):
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (4, 4), (100 * i, 0, 0)).save(path / name / f"{i}.png")
    return ImageFolder(path, (4, 4), 2)


def test_every_file_keeps_the_names(tmp_path):
    model = model_of(class_names=list(NAMES))
    assert model.class_names == NAMES
    model.save(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    preset = keras_jamba.DHCJamba.from_preset(tmp_path / "preset")
    assert loaded.class_names == preset.class_names == model_of(**preset.get_config()).class_names == NAMES
    assert model_of().class_names is None
    model.class_names = None
    assert model.class_names is None and model.get_config()["class_names"] is None


@pytest.mark.parametrize(
    "names", [("cat", "dog"), ("cat", "dog", "dog"), ("cat", "dog", 3), "emu", ("cat", "dog", ""), 3, {"a", "b", "c"}]
)
def test_other_names_are_refused(names):
    with pytest.raises(ValueError, match="class_names must be None or a sequence of num_classes=3 distinct strings. R"):
        model_of(class_names=names)
    with pytest.raises(ValueError, match="num_classes=3 distinct strings. Received.*another num_classes"):
        model_of().class_names = names


def test_another_number_of_classes_drops_the_names_of_a_preset(tmp_path):
    model_of(class_names=NAMES).save_to_preset(tmp_path / "preset")
    load = keras_jamba.DHCJamba.from_preset
    assert load(tmp_path / "preset", num_classes=2).class_names is None
    assert load(tmp_path / "preset", num_classes=2, class_names=("a", "b")).class_names == ("a", "b")
    assert load(tmp_path / "preset", num_classes=3).class_names == NAMES
    assert load(tmp_path / "preset", class_names=None).class_names is None
    renamed = load(tmp_path / "preset", class_names=("a", "b", "c"))
    same = load(tmp_path / "preset")
    np.testing.assert_array_equal(numpy(renamed.head.kernel), numpy(same.head.kernel))
    with pytest.raises(ValueError, match="num_classes=2 distinct strings. Received: 3 names"):
        load(tmp_path / "preset", num_classes=2, class_names=NAMES)


def test_the_built_in_presets_name_their_classes():
    for name in presets.list_presets():
        config = presets.read(name)[0]["config"]
        model = keras_jamba.DHCJamba.from_preset(name)
        assert model.class_names == tuple(config["class_names"]) and len(model.class_names) == config["num_classes"]
        assert json.loads(json.dumps(model.get_config()["class_names"])) == config["class_names"]


def test_predictions_are_the_softmax_of_the_logits_in_order():
    logits = np.array([[0.0, 2.0, 1.0], [5.0, 5.0, -1e30]])
    exponentials = np.exp(logits[0])
    decoded = model_of(class_names=NAMES).decode_predictions(keras.ops.convert_to_tensor(logits, "float32"))
    assert [name for name, _ in decoded[0]] == ["dog", "emu", "cat"]
    np.testing.assert_allclose([p for _, p in decoded[0]], exponentials[[1, 2, 0]] / exponentials.sum())
    # Equally probable classes keep their order.
    assert [name for name, _ in decoded[1]] == ["cat", "dog", "emu"] and decoded[1][0][1] == 0.5
    assert model_of().decode_predictions(logits, top=1) == [[("1", decoded[0][0][1])], [("0", 0.5)]]
    assert type(decoded[0][0][1]) is float


@pytest.mark.parametrize(
    "logits, options, message",
    [
        (np.zeros(3), {}, r"shape \(b, num_classes\) with num_classes=3. Received: shape=\(3,\).*logits\[None\]"),
        (np.zeros((2, 4)), {}, r"num_classes=3. Received: shape=\(2, 4\)"),
        (np.full((2, 3), np.nan), {}, "finite numbers.*Received.*not finite"),
        (np.full((2, 3), 1 / 3), {}, "before any softmax. Received: rows of probabilities.*Pass what predict returns"),
        (np.zeros((2, 3)), {"top": 0}, "top must be an integer of at least 1. Received: top=0"),
        (np.zeros((2, 3)), {"top": 1.5}, "top must be an integer of at least 1. Received: top=1.5"),
    ],
)
def test_invalid_logits_and_top_are_reported(logits, options, message):
    with pytest.raises(ValueError, match=message):
        model_of().decode_predictions(logits, **options)


def test_fit_takes_the_names_of_the_folder(tmp_path):
    folder = folder_of(tmp_path / "data", NAMES)
    model = model_of()
    assert len(model.evaluate(folder, verbose=0, return_dict=True)) and model.class_names is None
    model.fit(folder, verbose=0, validation_data=folder)
    assert model.class_names == NAMES
    predicted = model.decode_predictions(model.predict(folder, verbose=0))
    assert {name for row in predicted for name, _ in row} == set(NAMES)
    model.fit(folder, verbose=0)


class Examples(list):
    class_names = NAMES


def test_fit_takes_the_names_of_data_within_batches():
    examples = Examples((np.zeros((4, 4, 3), "float32"), i) for i in range(3))
    model = model_of()
    model.fit(Batches(examples, 3), verbose=0)
    assert model.class_names == NAMES
    assert Batches(list(examples), 3).class_names is None


def test_a_folder_with_other_classes_is_refused(tmp_path):
    other = folder_of(tmp_path / "other", ("cat", "cow", "emu"))
    fewer = folder_of(tmp_path / "fewer", ("cat", "dog"))
    model = model_of(class_names=NAMES)
    images, labels = np.zeros((2, 4, 4, 3), "float32"), np.array([0, 1])
    for run in (
        lambda data: model.fit(data, verbose=0),
        lambda data: model.evaluate(data, verbose=0),
        lambda data: model.fit(images, labels, validation_data=data, verbose=0),
    ):
        with pytest.raises(ValueError, match="class_names of the model.*Received: class 1 is 'cow' in the data"):
            run(other)
        with pytest.raises(ValueError, match="num_classes=3 distinct strings. Received: 2 names.*another num_classes"):
            run(fewer)
    model.class_names = other.class_names
    model.fit(other, verbose=0)


def test_a_model_with_one_output_takes_no_class_names(tmp_path):
    data = folder_of(tmp_path, ("cat", "dog"))
    model = model_of(num_classes=1)
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    model.fit(data, verbose=0)
    assert model.class_names is None

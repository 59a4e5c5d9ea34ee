"""Trainable flags of layers in custom models after saving, pickling, copying and cloning."""

import keras
import pytest
from checks import full, once
from saved_state import WAYS, WITH_WEIGHTS, backbone, image_classifier

from keras_jamba import layers


class Mixer(keras.layers.Layer):
    """A custom mixer whose sublayers have names by Keras."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = keras.layers.Dense(8), keras.layers.Dense(8)

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x):
        return self.second(self.first(x))


keras.saving.register_keras_serializable("tests")(Mixer)
GRID, SEQUENCE = (4, 4, 8), (5, 8)
LAYERS = {
    "MambaLayer": (lambda: layers.MambaLayer(8, d_state=4, mixer_rms_norm=True), SEQUENCE, ["ssm"]),
    "GatedConvLayer": (lambda: layers.GatedConvLayer(8, bidirectional=True), SEQUENCE, ["backward_conv"]),
    "AttentionLayer": (lambda: layers.AttentionLayer(8, 2), SEQUENCE, ["k_proj", "v_proj"]),
    "FeedForward": (lambda: layers.FeedForward(8), SEQUENCE, ["up_proj"]),
    "MoELayer": (lambda: layers.MoELayer(8, 2, d_ff=4), SEQUENCE, ["router"]),
    "JambaBlock": (
        lambda: layers.JambaBlock(layers.MambaLayer(8), layers.FeedForward(8)),
        SEQUENCE,
        ["mixer/in_proj", "mixer_norm"],
    ),
    "JambaBlock of a custom mixer": (lambda: layers.JambaBlock(Mixer(), None), SEQUENCE, ["mixer/second"]),
    "SpatialEncoder": (lambda: layers.SpatialEncoder(8), GRID, ["norms"]),
    "ResidualEncoder": (lambda: layers.ResidualEncoder(8, 2), GRID, ["norms"]),
    "PatchEncoder": (lambda: layers.PatchEncoder(8), GRID, ["projection"]),
    "FrameTokens": (lambda: layers.FrameTokens(8), (2, *GRID), ["projection"]),
    "SequencePooling": (lambda: layers.SequencePooling(), SEQUENCE, ["score"]),
    "JambaBackbone": (backbone, SEQUENCE, ["blocks/mixer"]),
    "DHCJamba": (lambda: image_classifier(pixel_range=None), (8, 8, 1), ["encoder", "backbone/final_norm"]),
}


def by_type(layer):
    """Returns the trainable flags per layer type, without names that depend on other built layers."""
    found = []
    for each in layer._flatten_layers():
        own = each._trainable_variables + each._non_trainable_variables
        found.append((type(each).__name__, each.trainable, sorted((v.name, v.trainable) for v in own)))
    return found


def inner(layer, path):
    """Returns the layer at a path of attributes, and the first layer of each list on it."""
    for name in path.split("/"):
        layer = getattr(layer, name)
        layer = layer[0] if isinstance(layer, (list, tuple)) else layer
    return layer


def within_functional(layer, shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


KINDS = {
    "functional": within_functional,
    "sequential": lambda layer, shape: keras.Sequential([keras.Input(shape), layer]),
}


@full()
@once
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_frozen_parts_of_a_layer_in_a_custom_model_stay_frozen(name, kind, tmp_path):
    make, shape, paths = LAYERS[name]
    layer = make()
    model = KINDS[kind](layer, shape)
    count = len(model.trainable_variables)
    for path in paths:
        inner(layer, path).trainable = False
    # Freeze one more variable, in a layer that is not frozen.
    others = [v for v in model.trainable_variables if not any(v is w for p in paths for w in inner(layer, p).weights)]
    for variable in others[-1:]:
        variable.trainable = False
    assert len(model.trainable_variables) < count
    for way in (*WITH_WEIGHTS.values(), WAYS["clone"]):
        assert by_type(way(model, tmp_path).layers[-1]) == by_type(layer)


@once
@pytest.mark.parametrize("name", LAYERS)
def test_a_completely_frozen_layer_stays_frozen(name, tmp_path):
    make, shape, _ = LAYERS[name]
    layer = make()
    model = within_functional(layer, shape)
    layer.trainable = False
    assert model.trainable_variables == []
    for way in (*WITH_WEIGHTS.values(), WAYS["clone"]):
        again = way(model, tmp_path)
        assert (again.trainable_variables, by_type(again.layers[-1])) == ([], by_type(layer))


def test_a_layer_frozen_by_its_constructor_is_not_trained():
    layer = layers.MambaLayer(8, trainable=False)
    model = within_functional(layer, SEQUENCE)
    assert model.trainable_variables == [] and not layer.in_proj.trainable
    layer.trainable = True
    assert len(model.trainable_variables) == len(layer.weights)


def test_configs_omit_the_default_trainable_state_and_old_configs_load():
    model = backbone()
    assert not {"trainable_state", "adapters", "sampler", "compiled_on"} & set(model.get_config())
    config = layers.MambaLayer(8).get_config()
    assert "trainable_state" not in config
    # Older configs of a completely frozen layer hold only Keras' flag.
    again = layers.MambaLayer.from_config(config | {"trainable": False})
    assert within_functional(again, SEQUENCE).trainable_variables == []


def test_a_layer_unfrozen_before_it_is_built_stays_trainable():
    layer = layers.MambaLayer(8)
    layer.build((None, *SEQUENCE))
    layer.in_proj.trainable = False
    again = layers.MambaLayer.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    again.trainable = False  # TensorFlow ignores the assignment of an unchanged value
    again.trainable = True
    again.build((None, *SEQUENCE))
    assert len(again.trainable_variables) == len(again.weights)


@once
def test_a_trainable_state_of_another_layer_is_reported():
    config = layers.MambaLayer(8).get_config() | {"trainable_state": {"layers": {"q_proj": False}}}
    with pytest.raises(ValueError, match="must name layers and variables of"):
        layers.MambaLayer.from_config(config).build((None, *SEQUENCE))

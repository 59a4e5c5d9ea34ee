"""Which layers and variables are frozen, as plain data for the configs of layers and models.

Keras stores `trainable` of the layers that it serializes. It stores neither that of the layers inside of a composite
layer nor that of variables, and `trainable=False` in a constructor does not reach the layers inside.
"""

import collections
import re

import keras

from keras_jamba import _keras_internals


class KeepsTrainable(_keras_internals.PostBuildHook):
    """Stands before `keras.layers.Layer` among the bases of a layer whose config says what is frozen inside of it.

    Args:
        trainable_state: what `trainable_state(layer)` returned, or None. It is applied when the layer is built.
    """

    def __init__(self, *args, trainable_state=None, **kwargs):
        super().__init__(*args, **kwargs)
        # Not by setattr, which Keras tracks.
        self.__dict__["_trainable_state"] = trainable_state

    @property
    def trainable(self):
        return keras.layers.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        # What is said now counts, not what the config said.
        self.__dict__.pop("_trainable_state", None)
        keras.layers.Layer.trainable.fset(self, value)

    def _on_built(self):
        state = self.__dict__.pop("_trainable_state", None)
        if (
            state is None
            and not self.trainable
            and all(inner.trainable for inner in _keras_internals.direct_sublayers(self))
        ):
            # `trainable=False` was an argument of the constructor.
            state = {"layers": {"": False}}
        if state is not None:
            apply_trainable_state(self, state)

    def get_config(self):
        state = self.__dict__.get("_trainable_state") or trainable_state(self)
        return super().get_config() | ({"trainable_state": state} if state else {})


def trainable_state(layer):
    """Which layers and variables do not follow the layer around them.

    Args:
        layer: a Keras layer or model.

    Returns:
        `{"layers": {path: bool}, "variables": {path: bool}}`, without the empty ones. The path of `layer` itself is "".
        Above `layer` everything counts as trainable; a variable that was made with `trainable=False` as frozen.
    """
    state = {"layers": {}, "variables": {}}
    for path, each, above in _walk(layer):
        if each.trainable != (above is None or above.trainable):
            state["layers"][path] = each.trainable
        for name, variable, usual in _variables(path, each):
            if variable.trainable != usual:
                state["variables"][name] = variable.trainable
    return {kind: flags for kind, flags in state.items() if flags}


def apply_trainable_state(layer, state):
    """Freezes and thaws layers and variables as `trainable_state` found them.

    Raises:
        ValueError: if the state names a layer or variable that is not there.
    """
    layers, variables = dict(state.get("layers", {})), dict(state.get("variables", {}))
    for path, each, above in _walk(layer):
        flag = layers.pop(path, above is None or above.trainable)
        # Not by setattr: TensorFlow passes over a value that an attribute has already, and the layers inside with it.
        keras.layers.Layer.trainable.fset(each, flag)
    for path, each, _ in _walk(layer):
        for name, variable, usual in _variables(path, each):
            flag = variables.pop(name, usual)
            if variable.trainable != flag:
                variable.trainable = flag
    if layers or variables:
        raise ValueError(
            f"trainable_state must name layers and variables of {layer.name!r}. Received: "
            f"{sorted({*layers, *variables})[:3]}, which it does not have. Load the model with the version of the "
            "package that saved it, or remove trainable_state from its config."
        )


def _walk(layer, path="", above=None):
    """`(path, layer, the layer around it)` of a layer and of all layers inside, from the outside in."""
    yield path, layer, above
    inner = _keras_internals.direct_sublayers(layer)
    for name, each in zip(_numbered(each.name for each in inner), inner, strict=True):
        yield from _walk(each, f"{path}/{name}" if path else name, layer)


def _variables(path, layer):
    """`(path, variable, whether it is trained where nobody said otherwise)` of the variables of a layer itself."""
    trained, others = _keras_internals.own_variables(layer)
    usual = [(v, layer.trainable) for v in trained] + [(v, False) for v in others]
    for name, (variable, flag) in zip(_numbered(v.name for v, _ in usual), usual, strict=True):
        yield f"{path}/{name}" if path else name, variable, flag


def _numbered(names):
    """Names with numbers of their own: those that Keras gives depend on what else the process has made."""
    counts = collections.Counter()
    for name in names:
        base = re.sub(r"_\d+$", "", name)
        yield f"{base}_{counts[base]}" if counts[base] else base
        counts[base] += 1

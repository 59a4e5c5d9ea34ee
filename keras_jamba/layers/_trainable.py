"""The `trainable` flags of layers and variables, as plain data for the configs of layers and models.

Keras stores `trainable` of the layers that it serializes. It stores neither the flags of sublayers of a composite layer
nor the flags of variables. `trainable=False` in a constructor does not reach sublayers.
"""

import collections
import re
from typing import Any

import keras

from keras_jamba import _keras_internals
from keras_jamba._typing import Config


class KeepsTrainable(_keras_internals.PostBuildHook):
    """A mixin whose config keeps the `trainable` flags inside a layer; a base class before `keras.layers.Layer`.

    Args:
        trainable_state: result of `trainable_state(layer)`, or None. The layer applies it when it is built.
    """

    def __init__(self, *args: Any, trainable_state: Config | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Not with setattr, because Keras tracks attributes.
        self.__dict__["_trainable_state"] = trainable_state

    @property
    def trainable(self) -> bool:
        return keras.layers.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        # A new value replaces the flags of the config.
        self.__dict__.pop("_trainable_state", None)
        keras.layers.Layer.trainable.fset(self, value)

    def _on_built(self):
        state = self.__dict__.pop("_trainable_state", None)
        if (
            state is None
            and not self.trainable
            and all(sublayer.trainable for sublayer in _keras_internals.direct_sublayers(self))
        ):
            # The constructor received `trainable=False`.
            state = {"layers": {"": False}}
        if state is not None:
            apply_trainable_state(self, state)

    def get_config(self) -> Config:
        state = self.__dict__.get("_trainable_state") or trainable_state(self)
        return super().get_config() | ({"trainable_state": state} if state else {})


def trainable_state(layer):
    """Returns the `trainable` flags that differ from their defaults.

    The default of a layer is the flag of its parent layer, and True for `layer` itself. The default of a variable is
    the flag of its layer, or False if it was created with `trainable=False`.

    Args:
        layer: a Keras layer or model.

    Returns:
        `{"layers": {path: bool}, "variables": {path: bool}}`, without empty entries. The path of `layer` itself is "".
    """
    state = {"layers": {}, "variables": {}}
    for path, each, parent in _walk(layer):
        if each.trainable != (parent is None or parent.trainable):
            state["layers"][path] = each.trainable
        for name, variable, default in _variables(path, each):
            if variable.trainable != default:
                state["variables"][name] = variable.trainable
    return {kind: flags for kind, flags in state.items() if flags}


def apply_trainable_state(layer, state):
    """Sets the `trainable` flags of layers and variables to a result of `trainable_state`.

    Raises:
        ValueError: if the state names a layer or variable that does not exist.
    """
    layers, variables = dict(state.get("layers", {})), dict(state.get("variables", {}))
    for path, each, parent in _walk(layer):
        flag = layers.pop(path, parent is None or parent.trainable)
        # Not with setattr: TensorFlow ignores an unchanged value and does not pass it on to sublayers.
        keras.layers.Layer.trainable.fset(each, flag)
    for path, each, _ in _walk(layer):
        for name, variable, default in _variables(path, each):
            flag = variables.pop(name, default)
            if variable.trainable != flag:
                variable.trainable = flag
    if layers or variables:
        raise ValueError(
            f"trainable_state must name layers and variables of {layer.name!r}. Received: "
            f"{sorted({*layers, *variables})[:3]}, which it does not have. Load the model with the version of the "
            "package that saved it, or remove trainable_state from its config."
        )


def _walk(layer, path="", parent=None):
    """Yields `(path, layer, parent)` of a layer and all its sublayers, parents first."""
    yield path, layer, parent
    sublayers = _keras_internals.direct_sublayers(layer)
    for name, each in zip(_numbered(each.name for each in sublayers), sublayers, strict=True):
        yield from _walk(each, f"{path}/{name}" if path else name, layer)


def _variables(path, layer):
    """Yields `(path, variable, default flag)` of a layer's own variables."""
    trained, others = _keras_internals.own_variables(layer)
    defaults = [(v, layer.trainable) for v in trained] + [(v, False) for v in others]
    for name, (variable, default) in zip(_numbered(v.name for v, _ in defaults), defaults, strict=True):
        yield f"{path}/{name}" if path else name, variable, default


def _numbered(names):
    """Yields names numbered per layer. Keras' numbers depend on the other objects of the process."""
    counts = collections.Counter()
    for name in names:
        base = re.sub(r"_\d+$", "", name)
        yield f"{base}_{counts[base]}" if counts[base] else base
        counts[base] += 1

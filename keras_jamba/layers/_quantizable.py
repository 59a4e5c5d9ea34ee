"""Matrices of layers that may be stored as int8 or int4."""

import contextlib
import gc
from typing import Any, Literal, cast

import keras
import numpy as np
from keras import ops

from keras_jamba import _backend, _keras_internals
from keras_jamba._typing import Array, Shape, Tensor, Tensors
from keras_jamba.ops import _checks
from keras_jamba.ops.quantization import QuantizedTensor, dequantized, quantized, storage_specs

MODES = ("int8", "int4")


class QuantizableWeights(_keras_internals.Mixin):
    """A mixin for a Keras layer whose matrices may be quantized.

    A matrix in floating point is one variable. A quantized matrix has additional variables, whose names end with
    "_scale" and "_zero". The dtype policy holds the mode, as in Keras: "int8_from_float32", for example.

    A subclass names its matrices in `MATRICES`, adds each with `_add_matrix` in `build`, and reads them with
    `stored_matrix`.
    """

    MATRICES: tuple[str, ...] = ()
    # The variables in the order of files without names.
    PLAIN: tuple[str, ...] = ()
    # Key in the table of `layers.quantization`.
    KIND: str = "projection"
    keeps_float: bool = False

    # Variables

    def _add_matrix(self, name, shape, **options):
        """Adds the variables of a matrix; `options` are `add_weight`'s for a matrix in floating point."""
        if self.quantization_mode not in MODES:
            setattr(self, self.attribute_of(name), self.add_weight(shape, name=name, **options))
            return
        for suffix, (part_shape, dtype) in storage_specs(shape, self.quantization_mode).items():
            initializer = "ones" if suffix == "_scale" else "zeros"
            given = dict(name=name + suffix, dtype=dtype, trainable=False, autocast=False)
            setattr(self, self.attribute_of(name) + suffix, self.add_weight(part_shape, initializer, **given))

    @staticmethod
    def attribute_of(name: str) -> str:
        """Returns the attribute that holds the values of a matrix."""
        # Dense has a property named "kernel".
        return _keras_internals.STORED_NAMES["kernel"] if name == "kernel" else name

    def matrices(self) -> list[str]:
        """Returns the names of the matrices that the layer has."""
        return [name for name in self.MATRICES if self.matrix_variable(name, "") is not None]

    def matrix_variable(self, name: str, suffix: str) -> Any:
        """Returns a variable of a matrix by its suffix: "" for the values, "_scale" and so on; None if absent."""
        # Not `getattr`, which is slow for an absent attribute of a module of PyTorch.
        return vars(self).get(self.attribute_of(name) + suffix)

    def own_variables(self) -> dict[str, keras.Variable]:
        """Returns `{name: variable}` without the variables of sublayers."""
        return {v.name: v for v in self.weights if v.path == f"{self.path}/{v.name}"}

    def stored_matrix(self, name: str) -> Tensor | QuantizedTensor:
        """Returns a matrix without its adapter: a tensor or a `QuantizedTensor`."""
        values = _backend.sharding.all_gather_weight(self.matrix_variable(name, ""))
        scale, zero = (self.matrix_variable(name, suffix) for suffix in ("_scale", "_zero"))
        if scale is None:
            return values
        zero = None if zero is None else ops.convert_to_tensor(zero)
        return QuantizedTensor(values, ops.convert_to_tensor(scale), zero)

    # Quantization

    def quantize(
        self, mode: Literal["int8", "int4"] | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Quantizes the matrices to "int8" or "int4". Activations are not quantized.

        Raises:
            ValueError: if the layer is not built or is quantized already, the mode is unknown, or the config has a
                quantizer.
        """
        _checks.check_choice("mode", mode, MODES)
        # Keras creates a config if the caller passes none.
        if getattr(config, "weight_quantizer", None) is not None:
            raise ValueError(
                f"{type(self).__name__} quantizes with `ops.quantization`. Received: a config with a weight_quantizer. "
                "Leave it out."
            )
        floats = {name: ops.convert_to_numpy(self.matrix_variable(name, "")) for name in self.matrices()}
        for name in floats:
            delattr(self, self.attribute_of(name))
        _keras_internals.mark_quantized(self)  # before the policy: its setter would quantize again
        self.set_mode(cast(Literal["int8", "int4"], mode))
        for name, value in floats.items():
            self._add_matrix(name, value.shape)
            self.assign_float(name, value)

    def set_mode(self, mode: Literal["int8", "int4"]) -> None:
        """Sets the mode of a layer that has no variables yet."""
        short = {"int8": "int8", "int4": "int4/64"}[mode]
        self.dtype_policy = keras.dtype_policies.get(f"{short}_from_{float_policy(self).name}")

    def quantized_build(self, shape: Shape, mode: str, config: Any = None) -> None:
        """Marks the layer as quantized. Keras' `build` calls it; our `build` adds the matrices."""
        _keras_internals.mark_quantized(self)

    def quantized_call(self, *args: Any, **kwargs: Any) -> Tensors:
        return self.call(*args, **kwargs)

    def assign_float(self, name: str, value: Tensor) -> None:
        """Assigns an array or a tensor in floating point to a variable; quantizes it for a quantized matrix."""
        if self.matrix_variable(name, "_scale") is None:
            variable = self.own_variables()[name]
            if isinstance(value, np.ndarray):
                _backend.tensors.fill(variable, value)
            else:
                variable.assign(value)
            return
        parts = quantized(ops.convert_to_numpy(value), self.quantization_mode)
        for suffix, part in parts.items():
            self.matrix_variable(name, suffix).assign(part)

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a matrix in floating point."""
        return tuple(self.stored_matrix(name).shape)

    def float_value(self, name: str) -> Array:
        """Returns a matrix without its adapter as a NumPy array in floating point."""
        return ops.convert_to_numpy(dequantized(self.stored_matrix(name), self.variable_dtype))

    def float_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns `{name: shape}` of the variables as they would be in floating point and without adapters."""
        shapes = {name: self.matrix_shape(name) for name in self.matrices()}
        # The variables of a matrix begin with its name: kernel, kernel_scale, kernel_lora_a.
        prefixes = tuple(f"{name}_" for name in shapes)
        own = {name: tuple(v.shape) for name, v in self.own_variables().items() if not name.startswith(prefixes)}
        return {name: shapes.get(name, shape) for name, shape in own.items()}

    # Files

    def save_own_variables(self, store: Any) -> None:
        own = self.own_variables()
        if set(own) <= set(self.PLAIN):
            names = {name: str(i) for i, name in enumerate(name for name in self.PLAIN if name in own)}
        else:
            names = {name: name for name in own}
        for name, key in names.items():
            store[key] = own[name]

    def load_own_variables(self, store: Any) -> None:
        own, keys = self.own_variables(), set(store.keys())
        if not own:
            return
        shapes = self.float_shapes()
        plain = [name for name in self.PLAIN if name in shapes]
        if keys == {str(i) for i in range(len(plain))}:
            # A file in floating point: quantized matrices are rounded again, adapters keep their values.
            for i, name in enumerate(plain):
                self.assign_float(name, store[str(i)])
        elif keys == set(own):
            for name, variable in own.items():
                variable.assign(store[name])
        else:
            raise ValueError(
                f"The stored variables of {self.path!r} must be the layer's variables, {sorted(own)}. Received: "
                f"{sorted(keys)}. Call quantize or enable_lora as it was before the weights were saved, or merge_lora "
                "before saving them."
            )


@contextlib.contextmanager
def deferred_garbage_collection():
    """Runs the garbage collector once at the end. Keras would run it after every removed variable.

    If the caller froze objects, none is frozen or unfrozen: later ones must stay collectable.
    """
    freezes = gc.get_freeze_count() == 0
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        gc.collect()


def quantizable_layers(layer):
    """Yields `(path, layer)` of each `QuantizableWeights` layer in `layer`; the path of `layer` itself is empty."""
    return _keras_internals.named_sublayers(layer, QuantizableWeights)


def float_policy(layer):
    """Returns the dtype policy of a layer without its quantization mode."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        # Only a built layer has a path.
        policy = policy[layer.path] if layer.path else policy.default_policy
    return keras.DTypePolicy(policy.name.split("_from_")[-1])

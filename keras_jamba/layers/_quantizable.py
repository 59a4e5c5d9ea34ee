"""Matrices of layers that may be stored as int8 or int4."""

import contextlib
import gc

import keras
from keras import ops

from keras_jamba import _backend, _keras_internals
from keras_jamba.ops import _checks
from keras_jamba.ops.quantization import QuantizedTensor, dequantized, quantized, storage_specs

MODES = ("int8", "int4")


class QuantizableWeights:
    """A mixin for a Keras layer whose matrices may be quantized.

    A matrix is one variable in floating point. A quantized matrix is several variables, whose names end with "_scale"
    and "_zero". The mode is that of the dtype policy, "int8_from_float32" for example, as everywhere in Keras.

    A subclass names its matrices in `MATRICES`, adds each in `build` by `_add_matrix`, and reads them by `_stored`.
    """

    MATRICES = ()
    # The variables in the order in which files without names store them.
    PLAIN = ()
    # Row of the table of `layers.quantization`.
    KIND = "projection"
    keeps_float = False

    # Variables

    def _add_matrix(self, name, shape, **options):
        """Adds the variables of a matrix; `options` are `add_weight`'s for one in floating point."""
        if self.quantization_mode not in MODES:
            setattr(self, self._attribute(name), self.add_weight(shape, name=name, **options))
            return
        for suffix, (part, dtype) in storage_specs(shape, self.quantization_mode).items():
            start = "ones" if suffix == "_scale" else "zeros"
            given = dict(name=name + suffix, dtype=dtype, trainable=False, autocast=False)
            setattr(self, self._attribute(name) + suffix, self.add_weight(part, start, **given))

    @staticmethod
    def _attribute(name):
        # Dense has a property of this name.
        return _keras_internals.STORED_NAMES["kernel"] if name == "kernel" else name

    def matrices(self):
        """The names of the matrices that there are."""
        return [name for name in self.MATRICES if self._part(name, "") is not None]

    def _part(self, name, suffix):
        return getattr(self, self._attribute(name) + suffix, None)

    def own_variables(self):
        """`{name: variable}` without those of layers inside."""
        return {v.name: v for v in self.weights if v.path == f"{self.path}/{v.name}"}

    def _stored(self, name):
        """Returns a matrix without its adapter: a tensor or a `QuantizedTensor`."""
        values = _backend.sharding.all_gather_weight(self._part(name, ""))
        scale, zero = (self._part(name, suffix) for suffix in ("_scale", "_zero"))
        if scale is None:
            return values
        zero = None if zero is None else ops.convert_to_tensor(zero)
        return QuantizedTensor(values, ops.convert_to_tensor(scale), zero)

    # Quantization

    def quantize(self, mode=None, type_check=True, config=None):
        """Stores the matrices in few bits: "int8", or "int4". Activations stay as they are.

        Raises:
            ValueError: if the layer is not built or quantized already, for another mode, or quantizers of one's own.
        """
        _checks.check_choice("mode", mode, MODES)
        # Keras makes a config where the caller has none.
        if getattr(config, "weight_quantizer", None) is not None:
            raise ValueError(
                f"{type(self).__name__} rounds as `ops.quantization` says. Received: a config with a weight_quantizer. "
                "Leave it out."
            )
        floats = {name: ops.convert_to_numpy(self._part(name, "")) for name in self.matrices()}
        for name in floats:
            delattr(self, self._attribute(name))
        _keras_internals.mark_quantized(self)  # before the policy, whose setter would quantize again
        self.set_mode(mode)
        for name, value in floats.items():
            self._add_matrix(name, value.shape)
            self.assign_float(name, value)

    def set_mode(self, mode):
        """The bits of a layer without variables so far."""
        short = {"int8": "int8", "int4": "int4/64"}[mode]
        self.dtype_policy = keras.dtype_policies.get(f"{short}_from_{float_policy(self).name}")

    def quantized_build(self, shape, mode, config=None):
        """Called by Keras' own `build`; the matrices are added by ours."""
        _keras_internals.mark_quantized(self)

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def assign_float(self, name, value):
        """Gives a variable its value; a matrix in few bits is rounded to them."""
        if self._part(name, "_scale") is None:
            self.own_variables()[name].assign(value)
            return
        rounded = quantized(ops.convert_to_numpy(value), self.quantization_mode)
        for suffix, part in rounded.items():
            self._part(name, suffix).assign(part)

    def matrix_shape(self, name):
        return tuple(self._stored(name).shape)

    def float_value(self, name):
        """A matrix as a NumPy array in floating point, without its adapter."""
        return ops.convert_to_numpy(dequantized(self._stored(name), self.variable_dtype))

    def float_shapes(self):
        """Returns `{name: shape}` of the variables as they would be in floating point and without adapters."""
        shapes = {name: self.matrix_shape(name) for name in self.matrices()}
        # Scales, zeros and adapters have names that begin with that of their matrix.
        beside = tuple(f"{name}_" for name in shapes)
        own = {name: tuple(v.shape) for name, v in self.own_variables().items() if not name.startswith(beside)}
        return {name: shapes.get(name, shape) for name, shape in own.items()}

    # Files

    def save_own_variables(self, store):
        own = self.own_variables()
        if set(own) <= set(self.PLAIN):
            names = {name: str(i) for i, name in enumerate(name for name in self.PLAIN if name in own)}
        else:
            names = {name: name for name in own}
        for name, key in names.items():
            store[key] = own[name]

    def load_own_variables(self, store):
        own, keys = self.own_variables(), set(store.keys())
        if not own:
            return
        shapes = self.float_shapes()
        plain = [name for name in self.PLAIN if name in shapes]
        if keys == {str(i) for i in range(len(plain))}:
            # A file in floating point is rounded on its way in, and adapters stay what they are.
            for i, name in enumerate(plain):
                self.assign_float(name, store[str(i)])
        elif keys == set(own):
            for name, variable in own.items():
                variable.assign(store[name])
        else:
            raise ValueError(
                f"The stored variables of {self.path!r} must be those of the layer, {sorted(own)}. Received: "
                f"{sorted(keys)}. Call quantize or enable_lora as it was before the weights were saved, or merge_lora "
                "before saving them."
            )


@contextlib.contextmanager
def deferred_garbage_collection():
    """Keras looks through all objects of the process after each variable that is removed: here, once at the end."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.collect()


def quantizable_layers(layer, name=""):
    """Yields `(path, layer)` of the `QuantizableWeights` layers in a layer; its own path is empty."""
    if isinstance(layer, QuantizableWeights):
        yield name, layer
    for inner in _keras_internals.direct_sublayers(layer):
        yield from quantizable_layers(inner, f"{name}/{inner.name}" if name else inner.name)


def float_policy(layer):
    """The policy of a layer without the bits of its matrices."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        # A layer has its path when it is built.
        policy = policy[layer.path] if layer.path else policy.default_policy
    return keras.DTypePolicy(policy.name.split("_from_")[-1])

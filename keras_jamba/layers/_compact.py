"""Layers whose matrices may be stored in few bits, and may have low-rank adapters beside them."""

import contextlib
import gc

import keras
from keras import ops

from keras_jamba import _backend, _keras_internals
from keras_jamba.layers import _initializers
from keras_jamba.layers._decay import with_decay
from keras_jamba.layers._trainable import KeepsTrainable
from keras_jamba.ops import _checks
from keras_jamba.ops.few_bits import Quantized, dequantized, parts, product, quantized

MODES = ("int8", "int4")
ADAPTER = ("_lora_a", "_lora_b")


class Compact:
    """Stands before a Keras layer among the bases of a layer with matrices.

    A matrix is a variable; in few bits several, whose names go on with "_scale" and "_zero"; an adapter adds two more,
    "_lora_a" `(..., d, r)` and "_lora_b" `(..., r, f)`, whose product times alpha / rank is added to the matrix. In
    which bits is said by the dtype policy, "int8_from_float32" for example, as everywhere in Keras.

    A subclass has MATRICES, the names; adds each in `build` by `_add_matrix`, then calls `_adapt`; and computes with
    `_matrix` and `_product`.
    """

    MATRICES = ()
    # What stands in files that say nothing of names, in this order.
    PLAIN = ()
    # Row of the table of `layers.quantization`.
    KIND = "projection"
    keeps_float = False
    lora_enabled, lora_rank, lora_alpha = False, None, None

    # Building

    def _add_matrix(self, name, shape, **options):
        """Adds the variables of a matrix; `options` are `add_weight`'s for one in floating point."""
        if self.quantization_mode not in MODES:
            setattr(self, self._attribute(name), self.add_weight(shape, name=name, **options))
            return
        for suffix, (part, dtype) in parts(shape, self.quantization_mode).items():
            start = "ones" if suffix == "_scale" else "zeros"
            given = dict(name=name + suffix, dtype=dtype, trainable=False, autocast=False)
            setattr(self, self._attribute(name) + suffix, self.add_weight(part, start, **given))

    def _adapt(self):
        """Adds the adapters that a config asks for."""
        if self.lora_rank and not self.lora_enabled:
            self.enable_lora(self.lora_rank, self.lora_alpha)

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

    # Computing

    def _stored(self, name):
        """A matrix without its adapter: a tensor or `Quantized`."""
        values = _backend.sharding.all_gather_weight(self._part(name, ""))
        scale, zero = (self._part(name, suffix) for suffix in ("_scale", "_zero"))
        if scale is None:
            return values
        return Quantized(values, ops.convert_to_tensor(scale), None if zero is None else ops.convert_to_tensor(zero))

    def _matrix(self, name):
        """A matrix, its adapter multiplied out and added: a tensor, or `Quantized` where there is none."""
        stored = self._stored(name)
        if not self.lora_enabled:
            return stored
        a, b = (ops.convert_to_tensor(self._part(name, suffix)) for suffix in ADAPTER)
        change = ops.matmul(a, b) * (self.lora_alpha / self.lora_rank)
        return dequantized(stored, self.compute_dtype) + ops.cast(change, self.compute_dtype)

    def _product(self, x, name):
        """`x @ matrix`; the adapter is not multiplied out, so that it costs little, and no gradient of its size."""
        y = product(x, self._stored(name))
        if not self.lora_enabled:
            return y
        a, b = (ops.cast(self._part(name, suffix), y.dtype) for suffix in ADAPTER)
        return y + ops.matmul(ops.matmul(x, a), b) * (self.lora_alpha / self.lora_rank)

    # Fewer bits

    def quantize(self, mode=None, type_check=True, config=None):
        """Stores the matrices in few bits: "int8", or "int4". Activations stay as they are.

        Raises:
            ValueError: if the layer is not built or quantized already, for another mode, or quantizers of one's own.
        """
        _checks.check_choice("mode", mode, MODES)
        # Keras makes a config where the caller has none.
        if getattr(config, "weight_quantizer", None) is not None:
            raise ValueError(
                f"{type(self).__name__} rounds as `ops.few_bits` says. Received: a config with a weight_quantizer. "
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
        """`{name: shape}` of the variables as they would be in floating point and without adapters."""
        own = {name: tuple(v.shape) for name, v in self.own_variables().items()}
        matrices = {name: self.matrix_shape(name) for name in self.matrices()}
        beside = {name + suffix for name in matrices for suffix in ("_scale", "_zero", *ADAPTER)}
        return {name: matrices.get(name, shape) for name, shape in own.items() if name not in beside}

    # Adapters

    def enable_lora(self, rank, lora_alpha=None):
        """Adds to each matrix the product of two narrow ones, `(d, rank)` and `(rank, f)`, and freezes the matrix.

        The second starts as zeros: nothing changes at first.

        Args:
            rank: their width.
            lora_alpha: the product is multiplied by lora_alpha / rank; None for rank.

        Raises:
            ValueError: if the layer is not built, has adapters already, or for numbers out of range.

        Reference:
            [Hu et al. (2021)](https://arxiv.org/abs/2106.09685).
        """
        self.check_lora(rank, lora_alpha)
        with _keras_internals.unlocked(self):
            for name in self.matrices():
                *stack, d, f = self.matrix_shape(name)
                self._part(name, "").trainable = False
                starts = _initializers.uniform(d**-0.5), "zeros"
                shapes = (*stack, d, rank), (*stack, rank, f)
                for suffix, shape, start in zip(ADAPTER, shapes, starts, strict=True):
                    variable = with_decay(self.add_weight(shape, start, name=name + suffix, dtype="float32"))
                    setattr(self, self._attribute(name) + suffix, variable)
        self.lora_enabled, self.lora_rank, self.lora_alpha = True, rank, lora_alpha or rank

    def check_lora(self, rank, lora_alpha):
        """What `enable_lora` raises."""
        _checks.check_integer("rank", rank)
        if lora_alpha is not None:
            _checks.check_number("lora_alpha", lora_alpha, low=1e-6)
        if self.lora_enabled or not self.built:
            what = "has adapters already" if self.lora_enabled else "is not built"
            raise ValueError(
                f"Adapters are added once, to a layer with weights. Received: {self.path!r}, which {what}. "
                "Build it first, or merge_lora the old ones."
            )

    def merge_lora(self):
        """Adds the adapters to the matrices, once and for all, and removes them."""
        for name in self.matrices():
            a, b = (ops.cast(self._part(name, suffix), "float32") for suffix in ADAPTER)
            change = ops.matmul(a, b) * (self.lora_alpha / self.lora_rank)
            self.assign_float(name, ops.cast(dequantized(self._stored(name), "float32"), "float32") + change)
            self._part(name, "").trainable = self._part(name, "_scale") is None
            for suffix in ADAPTER:
                delattr(self, self._attribute(name) + suffix)
        self.lora_enabled, self.lora_rank, self.lora_alpha = False, None, None

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


class SublayerQuantizationConfig(KeepsTrainable):
    """Stands before a Keras layer among the bases of one that holds `Compact` layers, to be remade as it was."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.dtype_policy.quantization_mode is not None:
            raise ValueError(
                f"A {type(self).__name__} has a dtype policy in floating point, and its matrices have their own. "
                f"Received: dtype={self.dtype_policy.name!r}. Call keras_jamba.layers.quantize on the layer, before it "
                "is built or after."
            )

    def get_config(self):
        found = {}
        for name, layer in quantizable_layers(self):
            state = {"mode": layer.quantization_mode, "lora": [layer.lora_rank, layer.lora_alpha]}
            if layer.quantization_mode or layer.lora_rank:
                found[name] = state
        config = super().get_config()
        policies = isinstance(self.dtype_policy, keras.dtype_policies.DTypePolicyMap)
        config["dtype"] = keras.dtype_policies.serialize(self.dtype_policy if policies else float_policy(self))
        return config | ({"compact": found} if found else {})

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        found = config.pop("compact", {})
        layer = super().from_config(config)
        for name, inner in quantizable_layers(layer):
            if name in found:
                inner.lora_rank, inner.lora_alpha = found[name]["lora"]
                if found[name]["mode"]:
                    inner.set_mode(found[name]["mode"])
        return layer


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
    """`(name, layer)` of the `Compact` ones in a layer, by their way from it, and of itself by an empty name."""
    if isinstance(layer, Compact):
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

"""Low-rank adapters of the matrices of a layer."""

from typing import TYPE_CHECKING

from keras import ops

from keras_jamba import _backend, _keras_internals
from keras_jamba.layers import _initializers
from keras_jamba.layers._decay import with_decay
from keras_jamba.ops import _checks
from keras_jamba.ops.quantization import dequantized

if TYPE_CHECKING:
    from keras_jamba.layers._quantizable import QuantizableWeights as Mixin
else:
    from keras_jamba._keras_internals import Mixin

ADAPTER = ("_lora_a", "_lora_b")


class LoraWeights(Mixin):
    """A mixin that gives the matrices of a `QuantizableWeights` layer low-rank adapters.

    An adapter has two variables per matrix, "_lora_a" `(..., d, r)` and "_lora_b" `(..., r, f)`. The layer adds their
    product times `lora_alpha / lora_rank` to the matrix.

    The class uses `matrices`, `matrix_shape`, `matrix_variable`, `stored_matrix`, `attribute_of` and `assign_float` of
    `QuantizableWeights`.

    A subclass calls `_add_configured_adapters` at the end of `build`. It calls `_plus_lora` with a product with a
    matrix, or reads `_matrix`.

    Reference:
        [Hu et al. (2021)](https://arxiv.org/abs/2106.09685).
    """

    lora_enabled: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None

    def _add_configured_adapters(self):
        """Adds the adapters that a config requests."""
        if self.lora_rank and not self.lora_enabled:
            self.enable_lora(self.lora_rank, self.lora_alpha)

    def _lora_scale(self):
        return self.lora_alpha / self.lora_rank

    def _plus_lora(self, y, x, name):
        """Returns `y + x @ a @ b * scale`, without a product or a gradient of the size of the matrix."""
        a, b = (ops.convert_to_tensor(self.matrix_variable(name, suffix)) for suffix in ADAPTER)
        # The scale times the narrow matrix, not times all tokens.
        a, b = ops.cast(a, y.dtype), ops.cast(b * self._lora_scale(), y.dtype)
        return _backend.numerics.plus_matmul(y, ops.cast(ops.matmul(x, a), y.dtype), b)

    def _matrix(self, name):
        """Returns a matrix plus its adapter, a tensor; without an adapter possibly a `QuantizedTensor`."""
        stored = self.stored_matrix(name)
        if not self.lora_enabled:
            return stored
        a, b = (ops.convert_to_tensor(self.matrix_variable(name, suffix)) for suffix in ADAPTER)
        change = ops.matmul(a, b) * self._lora_scale()
        return dequantized(stored, self.compute_dtype) + ops.cast(change, self.compute_dtype)

    def enable_lora(self, rank: int, lora_alpha: float | None = None) -> None:
        """Adds an adapter to each matrix, two matrices `(d, rank)` and `(rank, f)`, and freezes the matrix.

        The second matrix is initially zero, so that the outputs do not change.

        Args:
            rank: width r of the adapters.
            lora_alpha: numerator of the scale `lora_alpha / rank` of the product; None means rank.

        Raises:
            ValueError: if the layer is not built, has adapters already, or a number is out of range.

        Reference:
            [Hu et al. (2021)](https://arxiv.org/abs/2106.09685).
        """
        self.check_lora(rank, lora_alpha)
        with _keras_internals.unlocked(self):
            for name in self.matrices():
                *stack, d, f = self.matrix_shape(name)
                self.matrix_variable(name, "").trainable = False
                initializers = _initializers.uniform(d**-0.5), "zeros"
                shapes = (*stack, d, rank), (*stack, rank, f)
                for suffix, shape, initializer in zip(ADAPTER, shapes, initializers, strict=True):
                    variable = with_decay(self.add_weight(shape, initializer, name=name + suffix, dtype="float32"))
                    setattr(self, self.attribute_of(name) + suffix, variable)
        self.lora_enabled, self.lora_rank, self.lora_alpha = True, rank, lora_alpha or rank

    def check_lora(self, rank: int, lora_alpha: float | None) -> None:
        """Raises the errors of `enable_lora`, without a change to the layer."""
        _checks.check_integer("rank", rank)
        if lora_alpha is not None:
            _checks.check_number("lora_alpha", lora_alpha, low=1e-6)
        if self.lora_enabled or not self.built:
            reason = "has adapters already" if self.lora_enabled else "is not built"
            raise ValueError(
                f"Adapters need a built layer without adapters. Received: {self.path!r}, which {reason}. "
                "Build the layer first, or call merge_lora to remove its adapters."
            )

    def merge_lora(self) -> None:
        """Adds the adapters to the matrices permanently and removes them."""
        for name in self.matrices():
            a, b = (ops.cast(self.matrix_variable(name, suffix), "float32") for suffix in ADAPTER)
            change = ops.matmul(a, b) * self._lora_scale()
            self.assign_float(name, ops.cast(dequantized(self.stored_matrix(name), "float32"), "float32") + change)
            self.matrix_variable(name, "").trainable = self.matrix_variable(name, "_scale") is None
            for suffix in ADAPTER:
                delattr(self, self.attribute_of(name) + suffix)
        self.lora_enabled, self.lora_rank, self.lora_alpha = False, None, None


def adaptable_layers(layer):
    """Yields `(path, layer)` of each `LoraWeights` layer in `layer`; the path of `layer` itself is empty."""
    return _keras_internals.named_sublayers(layer, LoraWeights)


def adapted_layers(layer):
    """Yields `(path, layer)` of each layer in `layer` that has adapters."""
    return ((path, each) for path, each in adaptable_layers(layer) if each.lora_enabled)

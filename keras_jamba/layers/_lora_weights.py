"""Low-rank adapters beside the matrices of a layer."""

from keras import ops

from keras_jamba import _keras_internals
from keras_jamba.layers import _initializers
from keras_jamba.layers._decay import with_decay
from keras_jamba.ops import _checks
from keras_jamba.ops.quantization import dequantized

ADAPTER = ("_lora_a", "_lora_b")


class LoraWeights:
    """A mixin for a layer with `QuantizableWeights`, whose matrices may have low-rank adapters.

    An adapter adds two variables per matrix, "_lora_a" `(..., d, r)` and "_lora_b" `(..., r, f)`. Their product times
    `lora_alpha / lora_rank` is added to the matrix.

    A subclass calls `_add_configured_adapters` at the end of `build`. It adds `_lora_product` to a product with a
    matrix, or reads `_matrix`.

    Reference:
        [Hu et al. (2021)](https://arxiv.org/abs/2106.09685).
    """

    lora_enabled, lora_rank, lora_alpha = False, None, None

    def _add_configured_adapters(self):
        """Adds the adapters that a config requests."""
        if self.lora_rank and not self.lora_enabled:
            self.enable_lora(self.lora_rank, self.lora_alpha)

    @property
    def _lora_scale(self):
        return self.lora_alpha / self.lora_rank

    def _lora_product(self, x, name, dtype):
        """Returns `x @ a @ b * scale`: no product and no gradient of the size of the matrix."""
        a, b = (ops.cast(self._part(name, suffix), dtype) for suffix in ADAPTER)
        return ops.matmul(ops.matmul(x, a), b) * self._lora_scale

    def _matrix(self, name):
        """Returns a matrix with its adapter added: a tensor, or a `QuantizedTensor` where there is no adapter."""
        stored = self._stored(name)
        if not self.lora_enabled:
            return stored
        a, b = (ops.convert_to_tensor(self._part(name, suffix)) for suffix in ADAPTER)
        change = ops.matmul(a, b) * self._lora_scale
        return dequantized(stored, self.compute_dtype) + ops.cast(change, self.compute_dtype)

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
            change = ops.matmul(a, b) * self._lora_scale
            self.assign_float(name, ops.cast(dequantized(self._stored(name), "float32"), "float32") + change)
            self._part(name, "").trainable = self._part(name, "_scale") is None
            for suffix in ADAPTER:
                delattr(self, self._attribute(name) + suffix)
        self.lora_enabled, self.lora_rank, self.lora_alpha = False, None, None

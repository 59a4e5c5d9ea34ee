"""The linear projections inside blocks."""

import keras

from keras_jamba import _backend, _keras_internals
from keras_jamba.layers._eager_fast_path import EagerFastPath
from keras_jamba.layers._lora_weights import LoraWeights
from keras_jamba.layers._quantizable import QuantizableWeights
from keras_jamba.ops.quantization import dequantized, product


@keras.saving.register_keras_serializable(package="keras_jamba")
class Projection(EagerFastPath, LoraWeights, QuantizableWeights, keras.layers.Dense):
    """`keras.layers.Dense` whose kernel may be quantized and have a low-rank adapter.

    Args:
        units, use_bias, kernel_initializer: see `keras.layers.Dense`.
        keeps_float: whether `quantize` skips the layer.
    """

    MATRICES, PLAIN = ("kernel",), ("kernel", "bias")

    def __init__(self, units, use_bias=False, keeps_float=False, **kwargs):
        super().__init__(units, use_bias=use_bias, **kwargs)
        self.keeps_float = keeps_float

    def build(self, input_shape):
        self._add_matrix("kernel", (input_shape[-1], self.units), initializer=self.kernel_initializer)
        self.bias = self.add_weight((self.units,), self.bias_initializer, name="bias") if self.use_bias else None
        self.built = True
        self._add_configured_adapters()

    @property
    def kernel(self):
        """The kernel's variable, or the matrix in floating point if it is quantized or has an adapter."""
        if self.quantization_mode is None and not self.lora_enabled:
            return _keras_internals.stored_weight(self, "kernel")
        return dequantized(self._matrix("kernel"), self.compute_dtype)

    def call(self, inputs, training=None):
        y = product(inputs, self.stored_matrix("kernel"))
        if self.lora_enabled:
            y = self._plus_lora(y, inputs, "kernel")
        return y if self.bias is None else y + self.bias

    def is_plain_product(self, inputs):
        """Returns whether a call is only the product with the stored matrix, without an adapter, a bias or hooks."""
        plain = not self.lora_enabled and self.bias is None
        return plain and _backend.trainer.can_bypass_layer_call(self, inputs)

    def quantize(self, mode=None, type_check=True, config=None):
        if not self.keeps_float:
            super().quantize(mode, type_check, config)

    def get_config(self):
        return super().get_config() | {"keeps_float": self.keeps_float}

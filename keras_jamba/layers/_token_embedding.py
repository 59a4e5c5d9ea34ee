"""Token embedding and the projection to logits."""

import keras
from keras import ops

from keras_jamba import _backend, _keras_internals
from keras_jamba.layers._quantizable import QuantizableWeights
from keras_jamba.ops._checks import check_token_ids
from keras_jamba.ops._product import product_in_float32
from keras_jamba.ops._sharding import check_divisible
from keras_jamba.ops.cross_entropy import linear_cross_entropy
from keras_jamba.ops.quantization import product


@keras.saving.register_keras_serializable(package="keras_jamba")
class TokenEmbedding(QuantizableWeights, keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding` whose projection to logits may be quantized.

    The embedding keeps its dtype: it is only a lookup, and its rounding errors would affect all layers. Logits are
    products in the compute dtype with float32 results. In bfloat16 the largest logits would often be equal.
    """

    MATRICES, PLAIN = ("reverse_embeddings",), ("embeddings", "reverse_embeddings")
    KIND = "head"

    @property
    def keeps_float(self):
        """Whether `quantize` skips the layer: tied weights are also the embedding."""
        return self.tie_weights

    def build(self, input_shape=None):
        check_divisible(self.output_dim, {"vocab_size": self.input_dim})
        initializer = self.embeddings_initializer
        variable = self.add_weight((self.input_dim, self.output_dim), initializer, name="embeddings")
        _keras_internals.store_weight(self, "embeddings", variable)
        if not self.tie_weights:
            self._add_matrix("reverse_embeddings", (self.output_dim, self.input_dim), initializer=initializer)
        # The embedding is per token, but Keras' layer does not declare support for masks.
        self.supports_masking = True
        self.built = True

    @property
    def embeddings(self):
        return _keras_internals.stored_weight(self, "embeddings")

    def call(self, inputs, reverse=False):
        if not reverse:
            return self._embedded(inputs)
        if self.quantization_mode is not None:
            return ops.cast(product(inputs, self.stored_matrix("reverse_embeddings")), "float32")
        if self.reverse_dtype is not None or self.logit_soft_cap is not None:
            return ops.cast(super().call(inputs, reverse=True), "float32")
        matrix = _backend.sharding.all_gather_weight(self.embeddings if self.tie_weights else self.reverse_embeddings)
        matrix = ops.transpose(matrix) if self.tie_weights else matrix
        # Keras' layer disables autocast, because its inputs are integers.
        return product_in_float32(inputs, ops.cast(matrix, inputs.dtype))

    @property
    def has_cross_entropy(self):
        """Whether `cross_entropy` is that of the logits of a call."""
        return self.reverse_dtype is None and self.logit_soft_cap is None

    def cross_entropy(self, features, targets):
        """Returns the losses `(b, t)` of the logits of features `(b, t, d)`, and predicted ids, in chunks of tokens."""
        if self.quantization_mode is not None and not self.tie_weights:
            return linear_cross_entropy(features, self.stored_matrix("reverse_embeddings"), targets)
        variable = self.embeddings if self.tie_weights else self.reverse_embeddings
        matrix = _backend.sharding.all_gather_weight(variable)
        return linear_cross_entropy(features, matrix, targets, self.tie_weights, variable.trainable)

    def _embedded(self, token_ids):
        """Returns the embeddings `(..., d)`.

        An id outside of the vocabulary raises an error. In compiled code and on accelerators its embedding is NaN.
        """
        matrix = _backend.sharding.all_gather_weight(self.embeddings)
        if (values := _backend.tensors.concrete_numpy(token_ids)) is not None:
            check_token_ids(values, self.input_dim)
            return ops.cast(ops.take(matrix, as_indices(token_ids), axis=0), self.compute_dtype)
        token_ids = as_indices(token_ids)
        clipped = ops.clip(token_ids, 0, self.input_dim - 1)
        embedded = ops.cast(ops.take(matrix, clipped, axis=0), self.compute_dtype)
        # sqrt(-1) is NaN. PyTorch would copy a constant to the device and synchronise.
        valid = ops.cast(ops.equal(token_ids, clipped), self.compute_dtype)
        return embedded + ops.expand_dims(ops.sqrt(valid - 1), -1)

    def compute_output_spec(self, inputs, reverse=False):
        spec = super().compute_output_spec(inputs, reverse=reverse)
        return keras.KerasTensor(spec.shape, "float32") if reverse else spec

    def enable_lora(self, rank, lora_alpha=None):
        raise ValueError(
            f"A token embedding has no adapter. Received: {self.path!r}. Train the complete layer: pass "
            f"also_train={self.name!r} to the model's enable_lora."
        )


def as_indices(token_ids):
    """Returns integers in a dtype that every backend accepts as indices; larger values wrap to negative ones."""
    dtype = keras.backend.standardize_dtype(token_ids.dtype)
    return token_ids if dtype in ("int32", "int64") else ops.cast(token_ids, "int64" if dtype == "uint64" else "int32")

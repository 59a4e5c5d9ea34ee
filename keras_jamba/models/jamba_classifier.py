"""The classifier of text."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Array, Config, DType, Tensor, Tensors
from keras_jamba.models._label_checks import check_labels
from keras_jamba.models._text_data import is_text, rows_of
from keras_jamba.models._text_model import TextModel
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class JambaClassifier(TextModel):
    """A classifier of texts: token embedding, `JambaBackbone`, and projection of the last real token to the classes.

    Compile with a loss that takes logits: `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`.

    Args:
        vocab_size: size v of the vocabulary: token ids are from 0 to v - 1.
        num_classes: number of classes.
        bos_token_id, eos_token_id, pad_token_id: ids of the special tokens, or None; eos_token_id may be several ids.
        transformers_config: further entries of a checkpoint's config.json, which exports write back; or None.
        **backbone: any argument of `JambaBackbone`, with the defaults of `JambaCausalLM`.

    Call arguments:
        inputs: see `JambaCausalLM`; each row must have a real token.
        training: whether to apply dropout.

    Returns:
        Logits `(b, num_classes)`, float32 under every dtype policy, without softmax.

    Raises:
        ValueError: for arguments that are out of range or do not fit together, for ids out of the vocabulary, and for
            rows without a real token. Inside compiled functions and on accelerators, such ids and rows give NaN
            instead.

    Example:
        >>> import numpy as np, keras_jamba
        >>> model = keras_jamba.JambaClassifier(vocab_size=256, num_classes=2, d_model=64, num_layers=2)
        >>> model({"token_ids": np.array([[72, 105, 0]]), "padding_mask": np.array([[True, True, False]])}).shape
        (1, 2)
    """

    _head_arguments = ("num_classes",)

    @_checks.python_numbers
    def __init__(
        self,
        vocab_size: int,
        num_classes: int = 2,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        transformers_config: Config | None = None,
        dtype: DType | None = None,
        name: str | None = None,
        **backbone: Any,
    ) -> None:
        _checks.check_integer("num_classes", num_classes)
        options = dict(
            vocab_size=vocab_size,
            num_classes=num_classes,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            transformers_config=transformers_config,
        )
        super().__init__(options, backbone, dtype, name)
        self.head = keras.layers.Dense(num_classes, use_bias=False, name="head", dtype=self.dtype_policy)
        self.head.build((None, self._config["d_model"]))
        self.build()

    def call(self, inputs: Tensors, training: bool | None = None) -> Tensor:
        embeddings, given = self._prepare_inputs(inputs)
        features = self.backbone(embeddings, **given, training=training)
        return ops.cast(self.head(_last_real_token(features, given["padding_mask"])), "float32")

    def check_batch(self, x: Tensors, y: Tensors | None = None, sample_weight: Tensors | None = None) -> None:
        """Raises ValueError for inputs and labels that do not fit the model and its loss."""
        super().check_batch(x, y, sample_weight)
        if y is not None and hasattr(y, "shape"):
            check_labels(y, self.loss, (y.shape[0], self._config["num_classes"]), sample_weight)

    # Further arguments of Keras are keywords only.
    def compile(  # type: ignore[override]
        self, optimizer: Any = "auto", loss: Any = "auto", *, metrics: Any = "auto", **kwargs: Any
    ) -> None:
        """Configures training like Keras; the defaults are Adam at 2e-5, cross-entropy of logits, and accuracy."""
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.Adam(2e-5)
        if isinstance(loss, str) and loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if isinstance(metrics, str) and metrics == "auto":
            metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def fit(
        self,
        x: Tensors | None = None,
        y: Tensors | None = None,
        *,
        sequence_length: int | None = None,
        validation_data: Tensors | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains on texts or lists of ids and their classes, or on any data of `keras.Model.fit`.

        Args:
            x: a list of strings or of lists of ids, or any x of `keras.Model.fit`.
            y: classes `(b,)`.
            sequence_length: the most tokens of a string or list, which `fit` truncates; None is the longest.
            validation_data: `(x, y)`, or any validation_data of `keras.Model.fit`.
            **kwargs: see `keras.Model.fit`.
        """
        if isinstance(validation_data, tuple):
            validation_data = (self._inputs(validation_data[0], sequence_length), *validation_data[1:])
        return super().fit(self._inputs(x, sequence_length), y, validation_data=validation_data, **kwargs)

    def evaluate(
        self, x: Tensors | None = None, y: Tensors | None = None, *, sequence_length: int | None = None, **kwargs: Any
    ) -> Any:
        """Returns loss and metrics on data in any form of `fit`."""
        return super().evaluate(self._inputs(x, sequence_length), y, **kwargs)

    def predict(self, x: Tensors, *, sequence_length: int | None = None, **kwargs: Any) -> Array:
        """Returns the logits for any x of `fit`."""
        return super().predict(self._inputs(x, sequence_length), **kwargs)

    def _inputs(self, x, sequence_length):
        """Returns the inputs of a call: texts and lists as token ids and padding mask, other inputs unchanged."""
        if not is_text(x):
            return x
        token_ids, mask = rows_of(self, x, sequence_length, adds_eos=False)
        return {"token_ids": token_ids, "padding_mask": mask}

    def compute_output_spec(self, inputs: Tensors, training: bool | None = None) -> Tensor:
        first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
        return keras.KerasTensor((first.shape[0], self._config["num_classes"]), "float32")


def _last_real_token(features, mask):
    """Returns the features `(b, d)` of the last real token per row; NaN for a row without one.

    Raises:
        ValueError: for a row without a real token, if the host can read the mask.
    """
    if mask is None:
        return features[:, -1]
    mask = ops.cast(mask, "bool")
    values = _backend.tensors.concrete_numpy(mask)
    if values is not None and not values.any(axis=1).all():
        raise ValueError(
            "Every row must have a real token. Received: a padding_mask that is False for all tokens of row "
            f"{int(np.argmin(values.any(axis=1)))}. Leave the row out, or begin it with bos_token_id."
        )
    positions = ops.arange(ops.shape(features)[1], dtype="int32")[None]
    index = ops.max(ops.where(mask, positions, 0), axis=1)
    last = _backend.tensors.take_tokens(features, index[:, None])[:, 0]
    # sqrt(-1) is NaN.
    return last + ops.sqrt(ops.cast(ops.any(mask, axis=1), last.dtype) - 1)[:, None]

"""Training of language models on texts."""

import inspect
from typing import Any

import keras
import numpy as np

from keras_jamba._typing import Tensor, Tensors
from keras_jamba.generation.samplers import check_keywords, sampler_of
from keras_jamba.models import _chunked_loss
from keras_jamba.models._chunked_loss import TokenFeatures
from keras_jamba.models._label_checks import check_labels, class_numbers
from keras_jamba.models._loss import TokenCrossentropy, given_token_losses
from keras_jamba.models._text_data import are_conversations, conversation_rows, is_text, next_tokens, rows_of
from keras_jamba.models._text_model import TextModel
from keras_jamba.models._token_weights import check_weights, class_weights, token_weights
from keras_jamba.ops import _checks

_GIVEN = ("token_ids", "padding_mask", "segment_ids", "reset_mask")
_COMPILE = ("optimizer", "loss", "weighted_metrics", "sampler", *inspect.signature(keras.Model.compile).parameters)
_COMPILE = tuple(name for name in dict.fromkeys(_COMPILE) if name != "self")


class NextTokenModel(TextModel):
    """The abstract base of models that predict the next token: `compile`, `fit` and `evaluate`.

    For targets `(b, t)`, a sample_weight may have one number per token, `(b, t)`, or one per row, `(b,)` or `(b, 1)`.
    The weight of a row applies to each of its tokens. Inputs that a padding_mask hides have no weight. The loss of a
    batch and weighted_metrics are means over the tokens with these weights.

    Attributes:
        sampler: the sampler of `compile`; None means that of generation_config, or greedy.
    """

    sampler: Any = None
    # Whether the arguments of `compile` suit a loss in chunks.
    _suits_chunks = False

    # Further arguments of Keras are keywords only.
    def compile(  # type: ignore[override]
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        sampler: Any = "auto",
        **kwargs: Any,
    ) -> None:
        """Configures training like `keras.Model.compile`, with defaults.

        Args:
            optimizer: "auto" is Adam at 2e-5, for fine-tuning.
            loss: "auto" is the mean cross-entropy of the tokens with weight.
            weighted_metrics: "auto" is the accuracy of the tokens with weight.
            sampler: how `generate` chooses tokens. "auto" follows the model's `generation_config`, or is greedy without
                one. Others are "greedy", "random", "top_k" (5), "top_p" (.9), "min_p" (.05), a `keras_jamba.Sampler`, a
                `keras_jamba.generation.BeamSampler`, or a sampler of keras-hub with `get_next_token`.
            **kwargs: see `keras.Model.compile`.

        Raises:
            ValueError: for another sampler, and for unknown arguments.
        """
        check_keywords("compile", {name: x for name, x in kwargs.items() if name not in _COMPILE}, _COMPILE)
        self.sampler = None if isinstance(sampler, str) and sampler == "auto" else sampler_of(sampler)
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.Adam(2e-5)
        if isinstance(loss, str) and loss == "auto":
            loss = TokenCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
        if isinstance(weighted_metrics, str) and weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        self._suits_chunks = _chunked_loss.suits(loss, kwargs.get("metrics"), weighted_metrics)
        super().compile(optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs)

    def fit(
        self,
        x: Tensors | None = None,
        y: Tensors | None = None,
        *,
        sequence_length: int | None = None,
        validation_data: Tensors | None = None,
        sample_weight: Tensors | None = None,
        class_weight: dict[int, float] | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains on texts, on token ids, or on any data of `keras.Model.fit`.

        Args:
            x: a list of strings, to each of which `fit` appends the tokenizer's eos_token_id; or a list of lists of
                ids. Without y, also ids `(b, t + 1)`, or a dict of "token_ids" and optionally "padding_mask",
                "segment_ids" and "reset_mask", each `(b, t + 1)`. In these forms each token predicts the next one in
                its document. Or a list of conversations, each of which is a list of messages or a dict with "messages"
                and optionally "tools". Then the loss is that of the assistant's tokens alone, which the tokenizer's
                chat template marks by `{% generation %}`. Otherwise inputs of a call with targets y, or batches of
                both, for example of `training.PackedText` and `training.PackedConversations`.
            sequence_length: the most tokens of a string, list or conversation, which `fit` truncates; None is the
                longest.
            validation_data: data in the form of x, or a tuple as for `keras.Model.fit`.
            sample_weight: weights of targets y: one number per token, `(b, t)`, or per row, `(b,)` or `(b, 1)`. Padding
                and the targets of padding have no weight.
            class_weight: a dict of token ids and target weights, which multiply sample_weight; other ids have the
                weight 1. It applies to arrays, texts and lists. A dataset must yield weights itself.
            y, **kwargs: see `keras.Model.fit`.

        Raises:
            ValueError: for ids out of the vocabulary, weights of another shape, and class_weight with a dataset. For
                conversations, also if the template marks no answers, or sequence_length truncates all of them.
        """
        x, y, sample_weight = self._examples(x, y, sample_weight, sequence_length)
        sample_weight = _weights(x, y, sample_weight, class_weight)
        if validation_data is not None and not isinstance(validation_data, tuple):
            found = self._examples(validation_data, None, None, sequence_length)
            validation_data = found if found[1] is not None else found[0]
        return super().fit(x, y, sample_weight=sample_weight, validation_data=validation_data, **kwargs)

    def evaluate(
        self,
        x: Tensors | None = None,
        y: Tensors | None = None,
        *,
        sequence_length: int | None = None,
        sample_weight: Tensors | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns loss and metrics on data in any form of `fit`."""
        x, y, sample_weight = self._examples(x, y, sample_weight, sequence_length)
        sample_weight = _weights(x, y, sample_weight)
        return super().evaluate(x, y, sample_weight=sample_weight, **kwargs)

    def train_on_batch(
        self,
        x: Tensors,
        y: Tensors | None = None,
        sample_weight: Tensors | None = None,
        class_weight: dict[int, float] | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Runs one training step on a batch; see `keras.Model.train_on_batch`, and `fit` for the weights."""
        sample_weight = _weights(x, y, sample_weight, class_weight)
        return super().train_on_batch(x, y, sample_weight=sample_weight, return_dict=return_dict)

    def test_on_batch(
        self,
        x: Tensors,
        y: Tensors | None = None,
        sample_weight: Tensors | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Returns loss and metrics of a batch; see `keras.Model.test_on_batch`, and `fit` for the weights."""
        return super().test_on_batch(x, y, sample_weight=_weights(x, y, sample_weight), return_dict=return_dict)

    def check_batch(self, x: Tensors, y: Tensors | None = None, sample_weight: Tensors | None = None) -> None:
        """Raises ValueError for inputs and targets that do not fit the model and its loss."""
        super().check_batch(x, y, sample_weight)
        if y is None or not hasattr(y, "shape"):
            return
        vocab_size = self._config["vocab_size"]
        check_labels(y, self.loss, (*y.shape[:2], vocab_size), weights=token_weights(x, y, sample_weight))

    def compute_loss(
        self,
        x: Tensors | None = None,
        y: Tensors | None = None,
        y_pred: Tensors | None = None,
        sample_weight: Tensors | None = None,
        training: bool = True,
    ) -> Tensor:
        """Computes the loss; see `keras.Model.compute_loss`. Weights may be per row."""
        weights = token_weights(x, y, sample_weight)
        if not isinstance(y_pred, TokenFeatures):
            return super().compute_loss(x, y, y_pred, weights, training)
        if not _chunked_loss.is_one_id_per_token(y, y_pred):
            logits = self.logits(y_pred.features)
            loss = super().compute_loss(x, y, logits, weights, training)
            super().compute_metrics(x, y, logits, weights)
            return loss
        targets = class_numbers(y, self.loss, self._config["vocab_size"])
        losses, predicted = self.token_embedding.cross_entropy(y_pred.features, targets)
        super().compute_metrics(x, *_chunked_loss.as_two_classes(y, predicted), weights)
        with given_token_losses():
            return super().compute_loss(x, y, losses, weights, training)

    def _class_count(self, y_pred):
        # Logits are (b, t, v), and losses of tokens (b, t).
        is_losses = hasattr(y_pred, "shape") and len(y_pred.shape) == 2
        return self._config["vocab_size"] if is_losses else super()._class_count(y_pred)

    def compute_metrics(
        self, x: Tensors, y: Tensors, y_pred: Tensors, sample_weight: Tensors | None = None
    ) -> dict[str, Any]:
        """Computes the metrics; see `keras.Model.compute_metrics`. Weights may be per row."""
        if isinstance(y_pred, TokenFeatures):
            return self.get_metrics_result()  # compute_loss has updated the metrics
        return super().compute_metrics(x, y, y_pred, token_weights(x, y, sample_weight))

    def _examples(self, x, y, sample_weight, sequence_length):
        """Returns `(x, y, sample_weight)`; texts, messages and ids without y become inputs, targets and weights."""
        if y is not None:
            return x, y, sample_weight
        of_answers = None
        # t inputs and t targets take t + 1 tokens.
        most = sequence_length and sequence_length + 1
        if are_conversations(x):
            token_ids, mask, of_answers = conversation_rows(self, x, most)
            found = next_tokens(token_ids, mask)
        elif is_text(x):
            found = next_tokens(*rows_of(self, x, most, adds_eos=True))
        elif isinstance(x, dict) and "token_ids" in x:
            given = {name: None if x.get(name) is None else keras.ops.convert_to_numpy(x[name]) for name in _GIVEN}
            found = next_tokens(*given.values())
        elif isinstance(x, np.ndarray) or keras.ops.is_tensor(x):
            found = next_tokens(x)
        else:
            return x, y, sample_weight
        if sample_weight is not None:
            raise ValueError(
                "sample_weight belongs to targets. Received: sample_weight, and no y. Pass inputs and targets, "
                "tokens[:, :-1] and tokens[:, 1:], or mark padding by a padding_mask."
            )
        inputs, targets, weights = found
        for token_ids in (inputs["token_ids"], targets):
            _checks.check_token_ids(token_ids, self._config["vocab_size"], counted=weights != 0)
        return inputs, targets, weights if of_answers is None else weights * of_answers[:, 1:]


def _weights(x, y, sample_weight, class_weight=None):
    """Returns the weights of targets times their class weights; raises before a step is compiled."""
    if class_weight is not None:
        return class_weights(class_weight, x, y, sample_weight)
    if sample_weight is not None and hasattr(y, "shape"):
        sample_weight = keras.ops.convert_to_numpy(sample_weight)
        check_weights(sample_weight, y)
    return sample_weight

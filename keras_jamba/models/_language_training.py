"""Training a language model on texts."""

import keras
import numpy as np

from keras_jamba.generation.samplers import BeamSampler, Sampler, sampler_of
from keras_jamba.models._loss import TokenCrossentropy
from keras_jamba.models._text_data import check_ids, compile_again, is_text, next_tokens, rows_of

_GIVEN = ("token_ids", "padding_mask", "segment_ids")


class LanguageTraining:
    """`compile`, `fit` and `evaluate` of a model that predicts the next token."""

    def compile(self, optimizer="auto", loss="auto", *, weighted_metrics="auto", sampler="greedy", **kwargs):
        """Keras' own, with defaults.

        Args:
            optimizer: "auto" is Adam at 2e-5, for fine-tuning.
            loss: "auto" is the mean cross-entropy of the tokens that have weight.
            weighted_metrics: "auto" is their accuracy.
            sampler: how `generate` chooses: "greedy", "random", "top_k" (5), "top_p" (.9), "min_p" (.05), a
                `keras_jamba.Sampler`, a `keras_jamba.generation.BeamSampler`, or a sampler of keras-hub that has
                `get_next_token`.
            **kwargs: see `keras.Model.compile`.

        Raises:
            ValueError: for a sampler that is none of these.
        """
        self.sampler = sampler_of(sampler)
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.Adam(2e-5)
        if isinstance(loss, str) and loss == "auto":
            loss = TokenCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
        if isinstance(weighted_metrics, str) and weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        super().compile(optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs)

    def get_compile_config(self):
        ours = isinstance(self.sampler, (Sampler, BeamSampler))
        sampler = keras.saving.serialize_keras_object(self.sampler) if ours else "greedy"
        return super().get_compile_config() | {"sampler": sampler}

    def compile_from_config(self, config):
        compile_again(self, config)

    def fit(self, x=None, y=None, *, sequence_length=None, validation_data=None, sample_weight=None, **kwargs):
        """Trains on texts, on token ids, or on what `keras.Model.fit` takes.

        Args:
            x: a list of strings, each of which ends with the tokenizer's eos_token_id; a list of lists of ids; or
                without a y, ids `(b, t + 1)` or `{"token_ids", "padding_mask", "segment_ids"}` of them, the latter two
                where wanted: each token is to predict the one after it in its document. Else inputs of a call with
                targets y, or batches of both, from `training.PackedText` for example.
            sequence_length: strings and lists are cut to so many tokens; None for the longest.
            validation_data: as x, or a tuple as `keras.Model.fit` takes.
            y, sample_weight, **kwargs: see `keras.Model.fit`. Neither padding nor what it would predict has weight.
        """
        x, y, sample_weight = self._examples(x, y, sample_weight, sequence_length)
        if validation_data is not None and not isinstance(validation_data, tuple):
            found = self._examples(validation_data, None, None, sequence_length)
            validation_data = found if found[1] is not None else found[0]
        return super().fit(x, y, sample_weight=sample_weight, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, y=None, *, sequence_length=None, sample_weight=None, **kwargs):
        """Loss and metrics on what `fit` takes."""
        x, y, sample_weight = self._examples(x, y, sample_weight, sequence_length)
        return super().evaluate(x, y, sample_weight=sample_weight, **kwargs)

    def _examples(self, x, y, sample_weight, sequence_length):
        if y is not None:
            return x, y, sample_weight
        if is_text(x):
            # A row of t tokens and the one after the last.
            token_ids, mask = rows_of(self, x, sequence_length and sequence_length + 1, adds_eos=True)
            found = next_tokens(token_ids, mask)
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
                "tokens[:, :-1] and tokens[:, 1:], or tell padding by padding_mask."
            )
        check_ids(found[0]["token_ids"], found[1], found[2], self.get_config()["vocab_size"])
        return found

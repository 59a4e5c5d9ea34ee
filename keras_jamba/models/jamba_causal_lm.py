"""The language model: token ids in, logits of the next token out."""

import keras
from keras import ops

from keras_jamba.layers._requested import append_requested
from keras_jamba.models._generation import Generation
from keras_jamba.models._language_training import LanguageTraining
from keras_jamba.models._text_model import TextModel
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class JambaCausalLM(Generation, LanguageTraining, TextModel):
    """Jamba as a language model: embedding, `JambaBackbone`, projection to the vocabulary.

    What is not said here has the defaults of `JambaBackbone`, but for those in which AI21's Jamba differs: no RoPE,
    weights of the chosen experts not normalised, and one balance loss over all layers with experts, the "switch" form
    with the coefficient .001.

    Args:
        vocab_size: size v of the vocabulary: token ids are from 0 to v - 1.
        tie_embeddings: whether the output projection is the embedding.
        bos_token_id, eos_token_id, pad_token_id: ids of the special tokens, or None; of eos one or several.
        transformers_config: what else the config.json of a checkpoint says, to be written back with it; or None.
        **backbone: any argument of `JambaBackbone` but direction, which is causal.

    Call arguments:
        inputs: token ids `(b, t)`; or a dict of `"token_ids"` `(b, t)` or, for what is not all text,
            `"inputs_embeds"` `(b, t, d)`, and where wanted `"padding_mask"` `(b, t)` bool, False for padding on
            whichever side, `"segment_ids"` `(b, t)`, the documents of packed rows, and `"reset_mask"` `(b, t)` bool,
            True where a sequence begins anew; see `JambaBackbone`.
        logits_to_keep: None or 0 for the logits of all tokens, n for those of the last n, or a list of positions.
        initial_state, return_state: see `JambaBackbone`.
        training: whether to drop out.

    Returns:
        Logits `(b, t, v)`, float32 under every dtype policy; or that and the state.

    Raises:
        ValueError: for arguments out of range or that do not fit together, and for ids out of the vocabulary. Inside
            compiled functions and on accelerators such an id gives NaN instead.

    Example:
        >>> import keras_jamba
        >>> model = keras_jamba.JambaCausalLM(vocab_size=256, d_model=64, num_layers=4, mamba_ratio=3)
        >>> model({"token_ids": [[72, 101, 108]], "padding_mask": [[True, True, True]]}).shape
        (1, 3, 256)

    Reference:
        [Lieber et al. (2024)](https://arxiv.org/abs/2403.19887).
    """

    @_checks.python_numbers
    def __init__(
        self,
        vocab_size,
        tie_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        transformers_config=None,
        dtype=None,
        name=None,
        **backbone,
    ):
        options = dict(
            vocab_size=vocab_size,
            tie_embeddings=tie_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            transformers_config=transformers_config,
        )
        if "direction" in backbone:
            _checks.check_choice("direction of a language model", backbone["direction"], ("causal",))
        super().__init__(options, backbone, dtype, name)
        self.build()

    def call(self, inputs, logits_to_keep=None, initial_state=None, return_state=False, training=None):
        embeddings, given = self._read(inputs)
        given |= dict(initial_state=initial_state, return_state=return_state, training=training)
        features = self.backbone(embeddings, **given)
        features, state = features if return_state else (features, None)
        return append_requested(self.logits(_kept(features, logits_to_keep)), (return_state, state))

    def logits(self, features):
        """Logits `(..., v)`, float32, of features `(..., d)` of the backbone."""
        return self.token_embedding(features, reverse=True)

    def init_cache(self, batch_size, max_length=None):
        """The state before the first token, with room for `max_length` tokens; see `JambaBackbone.init_cache`."""
        return self.backbone.init_cache(batch_size, max_length)

    def step(self, inputs, cache, logits_to_keep=None, return_rollback_state=False):
        """Some more tokens after those that a cache has seen: a prefill, or one token at a time.

        Args:
            inputs, logits_to_keep: see a call.
            cache: what `init_cache` or an earlier step returned. It is not changed.
            return_rollback_state: whether to return what `rollback` takes too.

        Returns:
            `(logits (b, t, v), cache)`, or that and the rollback_state; each token is to be given once.

        Raises:
            ValueError: if the cache is of another model or batch, or attention has no room left.
        """
        embeddings, given = self._read(inputs)
        given |= {"return_rollback_state": True} if return_rollback_state else {}
        features, *rest = self.backbone.step(embeddings, cache, **given)
        return self.logits(_kept(features, logits_to_keep)), *rest

    def rollback(self, rollback_state, count):
        """The cache after only the first `count` `(b,)` tokens of each row of a step; see `JambaBackbone.rollback`."""
        return self.backbone.rollback(rollback_state, count)

    def compute_output_spec(self, inputs, logits_to_keep=None, initial_state=None, return_state=False, training=None):
        inputs = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
        shape = inputs["inputs_embeds" if inputs.get("token_ids") is None else "token_ids"].shape
        features = keras.KerasTensor((*shape[:2], self._config["d_model"]), self.compute_dtype)
        state = self.backbone.compute_output_spec(features, return_state=True)[1] if return_state else None
        count = shape[1] if not _kept_count(logits_to_keep) else _kept_count(logits_to_keep)
        logits = keras.KerasTensor((shape[0], count, self._config["vocab_size"]), "float32")
        return append_requested(logits, (return_state, state))


def _kept(features, logits_to_keep):
    """The tokens whose logits are wanted."""
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool):
        _checks.check_integer("logits_to_keep", logits_to_keep, at_least=0)
        return features[:, -logits_to_keep:]
    if logits_to_keep is None:
        return features
    return ops.take(features, ops.convert_to_tensor(logits_to_keep, dtype="int32"), axis=1)


def _kept_count(logits_to_keep):
    return logits_to_keep if isinstance(logits_to_keep, int | None) else len(logits_to_keep)

"""The language model: token ids in, logits of the next token out."""

import keras
from keras import ops

from keras_jamba.generation import api
from keras_jamba.generation.samplers import check_keywords
from keras_jamba.layers._requested import append_requested, split_requested
from keras_jamba.models._fingerprint import fingerprint
from keras_jamba.models._language_training import NextTokenModel
from keras_jamba.ops import _checks

_STREAM = ("max_length", "max_new_tokens", "stop_token_ids", "sampler", "stop_strings", "prefill_chunk_size", "state")
_STREAM += ("assistant",)
_GENERATE = (*_STREAM, "strip_prompt")


@keras.saving.register_keras_serializable(package="keras_jamba")
class JambaCausalLM(NextTokenModel):
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
        features, state = split_requested(self.backbone(embeddings, **given), return_state)
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

    # Generation

    def generate(
        self,
        inputs,
        max_length=None,
        max_new_tokens=None,
        stop_token_ids="auto",
        strip_prompt=False,
        sampler=None,
        stop_strings=None,
        prefill_chunk_size=512,
        state=None,
        assistant=None,
        **unknown,
    ):
        """Goes on from prompts.

        What is not passed is as the model's `generation_config` says, the dict of a checkpoint's
        generation_config.json, which transformers follows too: stop tokens, lengths, stop strings, and the sampler
        unless `compile` was given one. Prompts of different lengths stand in one batch without seeing each other or
        their padding; each gives what it gives alone.

        Args:
            inputs: a string or a list of strings; a conversation, a list of `{"role": ..., "content": ...}`, or a list
                of conversations, which the tokenizer's chat template renders with the beginning of an answer; token
                ids: a list, a list of lists, or an array `(b, t)`; or
                `{"token_ids": (b, t), "padding_mask": (b, t)}`, padded on either side.
            max_length: the most tokens of a row, the prompt included.
            max_new_tokens: the most tokens after the prompt. Where both are given the first to be reached counts.
                Where none is, those of generation_config count, which is 20 new tokens where it names none, as in
                transformers; without a generation_config, 128 new tokens.
            stop_token_ids: after one of these a row ends; None to never stop. "auto" is generation_config's
                eos_token_id, none where it names none; without a generation_config the model's eos_token_id, or else
                the tokenizer's.
            strip_prompt: whether to give back the new tokens alone: of a conversation the answer.
            sampler: see `compile`; it replaces all that generation_config says about the choice of tokens. None for
                the sampler of `compile`, or else generation_config's, or else greedy.
            stop_strings: before one of these a text ends; needs a tokenizer. The text of special tokens counts, though
                it is not given back. A stop string may begin in the prompt.
            prefill_chunk_size: tokens of the prompts that are read at a time: less memory for more calls.
            state: what `prefill` returned for a text with which every prompt begins; it is not read again.
            assistant: a `keras_jamba.generation.PromptLookup` or `DraftModel`, which proposes tokens that the model
                checks several at a time; or None. What comes out is what comes out without, with every sampler of ours
                and the same seed, but where rounding decides between two tokens; its `statistics` and
                `acceptance_rate` tell whether it helped. Not for beams, and not exact with a `capacity_factor`, under
                which tokens that are read together drop each other.

        Returns:
            For a string or a conversation a string, for a list of them a list of these, special tokens left out. For
            one list of ids an int32 array, for a list of lists a list of arrays, each ending with its stop token, if
            any; for an array or a dict one array `(b, t)`, padded where the inputs were, with the pad_token_id of
            generation_config, or of the model, or 0.

        Raises:
            ValueError: for prompts without tokens, longer than max_length, with ids out of the vocabulary, or that do
                not begin with the state's; for an assistant that cannot help this model or this sampler, stop strings
                with beams; and for what is not understood.

        Example:
            >>> import keras_jamba
            >>> model = keras_jamba.JambaCausalLM(vocab_size=16, d_model=16, num_layers=2, mamba_ratio=1)
            >>> model.generate([[1, 2, 3]], max_new_tokens=4)[0].shape
            (7,)
        """
        check_keywords("generate", unknown, _GENERATE)
        return api.generate(
            self,
            inputs,
            strip_prompt,
            prefill_chunk_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            sampler=sampler,
            stop_strings=stop_strings,
            state=state,
            assistant=assistant,
        )

    def stream(self, inputs, **given):
        """Goes on from one prompt, and gives each piece as soon as it is there.

        Args:
            inputs: a string, a conversation, or a list of token ids.
            **given: what `generate` takes, but strip_prompt. With an assistant tokens come several at a time.

        Returns:
            An iterator: over pieces of text for a string, which together are what `generate` returns without the
            prompt; over ints for ids.

        Raises:
            ValueError: see `generate`; for more than one prompt, and for beams too.
        """
        check_keywords("stream", {name: x for name, x in given.items() if name not in _STREAM}, _STREAM)
        return api.stream(self, inputs, **{"prefill_chunk_size": 512} | given)

    def prefill(self, inputs, prefill_chunk_size=512):
        """Reads one prompt, for `generate(inputs, state=...)` with inputs that begin with it.

        Args:
            inputs: a string, a conversation, or a list of token ids.
            prefill_chunk_size: see `generate`.

        Returns:
            A `PromptState`: `save(file)` and `PromptState.load(file)` keep it.

        Raises:
            ValueError: see `generate`; for more than one prompt too.
        """
        return api.prefill(self, inputs, prefill_chunk_size)

    def _fingerprint(self):
        return fingerprint(self)


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

"""The language model: token ids in, logits of the next token out."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import keras
from keras import ops

from keras_jamba import _keras_internals
from keras_jamba._typing import Array, Config, DType, Tensor, Tensors
from keras_jamba.generation import api
from keras_jamba.generation.assistants import Assistant
from keras_jamba.generation.prompt_state import PromptState
from keras_jamba.generation.samplers import check_keywords
from keras_jamba.layers._requested import append_requested, split_requested
from keras_jamba.models._chunked_loss import TokenFeatures, replaces_logits
from keras_jamba.models._fingerprint import fingerprint
from keras_jamba.models._language_training import NextTokenModel
from keras_jamba.ops import _checks

_STREAM = (
    *("max_length", "max_new_tokens", "stop_token_ids", "sampler", "stop_strings", "prefill_chunk_size", "state"),
    "assistant",
)
_GENERATE = (*_STREAM, "strip_prompt")


@keras.saving.register_keras_serializable(package="keras_jamba")
class JambaCausalLM(NextTokenModel):
    """A Jamba language model: token embedding, `JambaBackbone`, and projection to the vocabulary.

    The defaults are those of `JambaBackbone`, except where AI21's Jamba differs: no RoPE, weights of the chosen experts
    not normalised, and one "switch" balance loss over all expert layers with the coefficient .001.

    Args:
        vocab_size: size v of the vocabulary: token ids are from 0 to v - 1.
        tie_embeddings: whether the output projection is the embedding.
        bos_token_id, eos_token_id, pad_token_id: ids of the special tokens, or None; eos_token_id may be several ids.
        transformers_config: further entries of a checkpoint's config.json, which exports write back; or None.
        **backbone: any argument of `JambaBackbone` except direction, which is causal.

    Call arguments:
        inputs: token ids `(b, t)`, or a dict. The dict has `"token_ids"` `(b, t)` or, for inputs that are not only
            text, `"inputs_embeds"` `(b, t, d)`. Optional keys are `"padding_mask"` `(b, t)` bool, False for padding on
            either side; `"segment_ids"` `(b, t)`, the documents of packed rows; and `"reset_mask"` `(b, t)` bool, True
            where a sequence begins. See `JambaBackbone`.
        logits_to_keep: None or 0 for the logits of all tokens, n for those of the last n, or a list of positions.
        initial_state, return_state: see `JambaBackbone`.
        training: whether to apply dropout.

    Returns:
        Logits `(b, t, v)`, float32 under every dtype policy; with `return_state`, a tuple of logits and state.

    Raises:
        ValueError: for arguments that are out of range or do not fit together, and for ids out of the vocabulary.
            Inside compiled functions and on accelerators, such an id gives NaN instead.

    Example:
        >>> import numpy as np, keras_jamba
        >>> model = keras_jamba.JambaCausalLM(vocab_size=256, d_model=64, num_layers=4, mamba_ratio=3)
        >>> model({"token_ids": np.array([[72, 101, 0]]), "padding_mask": np.array([[True, True, False]])}).shape
        (1, 3, 256)

    Reference:
        [Lieber et al. (2024)](https://arxiv.org/abs/2403.19887).
    """

    @_checks.python_numbers
    def __init__(
        self,
        vocab_size: int,
        tie_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        transformers_config: Config | None = None,
        dtype: DType | None = None,
        name: str | None = None,
        **backbone: Any,
    ) -> None:
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

    def call(
        self,
        inputs: Tensors,
        logits_to_keep: int | Sequence[int] | Tensor | None = None,
        initial_state: dict[str, Tensors] | None = None,
        return_state: bool = False,
        training: bool | None = None,
    ) -> Tensors:
        embeddings, given = self._prepare_inputs(inputs)
        given |= dict(initial_state=initial_state, return_state=return_state, training=training)
        features, state = split_requested(self.backbone(embeddings, **given), return_state)
        if logits_to_keep is None and not return_state and replaces_logits(self, features):
            return TokenFeatures(features)
        return append_requested(self.logits(_select_tokens(features, logits_to_keep)), (return_state, state))

    def logits(self, features: Tensor) -> Tensor:
        """Returns the logits `(..., v)`, float32, of backbone features `(..., d)`."""
        return self.token_embedding(features, reverse=True)

    def init_cache(self, batch_size: int, max_length: int | None = None) -> dict[str, Tensors]:
        """Returns the state before the first token; see `JambaBackbone.init_cache` for the capacity `max_length`."""
        return self.backbone.init_cache(batch_size, max_length)

    def grow_cache(self, cache: dict[str, Tensors], max_length: int) -> dict[str, Tensors]:
        """Returns a cache that continues `cache`, with capacity for `max_length` tokens including those seen so far."""
        return self.backbone.grow_cache(cache, max_length)

    def step(
        self,
        inputs: Tensors,
        cache: dict[str, Tensors],
        logits_to_keep: int | Sequence[int] | Tensor | None = None,
        return_rollback_state: bool = False,
    ) -> tuple[Tensors, ...]:
        """Continues from a cache by further tokens: a prefill, or one token at a time.

        Args:
            inputs, logits_to_keep: see a call.
            cache: the result of `init_cache` or of an earlier step. It is not changed.
            return_rollback_state: whether to also return the rollback state for `rollback`.

        Returns:
            `(logits (b, t, v), cache)`, or a tuple of both and the rollback state. Pass each token once.

        Raises:
            ValueError: if the cache is of another model or batch, or a document exceeds the capacity of attention.
        """
        embeddings, given = self._prepare_inputs(inputs)
        given |= {"return_rollback_state": True} if return_rollback_state else {}
        features, *rest = self.backbone.step(embeddings, cache, **given)
        return self.logits(_select_tokens(features, logits_to_keep)), *rest

    def rollback(
        self, rollback_state: dict[str, Tensors] | Sequence[dict[str, Tensors]], count: Tensor | Sequence[int]
    ) -> dict[str, Tensors]:
        """Returns the cache after only the first `count` tokens per row of a step; see `JambaBackbone.rollback`."""
        return self.backbone.rollback(rollback_state, count)

    def compute_output_spec(
        self,
        inputs: Tensors,
        logits_to_keep: int | Sequence[int] | Tensor | None = None,
        initial_state: dict[str, Tensors] | None = None,
        return_state: bool = False,
        training: bool | None = None,
    ) -> Tensors:
        inputs = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
        shape = inputs["inputs_embeds" if inputs.get("token_ids") is None else "token_ids"].shape
        features = keras.KerasTensor((*shape[:2], self._config["d_model"]), self.compute_dtype)
        state = self.backbone.compute_output_spec(features, return_state=True)[1] if return_state else None
        count = shape[1] if not _selected_count(logits_to_keep) else _selected_count(logits_to_keep)
        logits = keras.KerasTensor((shape[0], count, self._config["vocab_size"]), "float32")
        return append_requested(logits, (return_state, state))

    # Generation

    @_keras_internals.restored_scopes()
    def generate(
        self,
        inputs: str | Sequence[Any] | Tensors,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: int | Sequence[int] | Array | Literal["auto"] | None = "auto",
        strip_prompt: bool = False,
        sampler: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        prefill_chunk_size: int | None = None,
        state: PromptState | None = None,
        assistant: Assistant | None = None,
        **unknown: Any,
    ) -> Any:
        """Generates the continuation of prompts.

        Arguments that are not passed follow the model's `generation_config`, the dict of a checkpoint's
        generation_config.json, as in transformers: stop tokens, lengths, stop strings, and the sampler unless `compile`
        set one. Prompts of different lengths share a batch. Each result is the same as for its prompt alone.

        Args:
            inputs: a string or a list of strings; a conversation, which is a list of `{"role": ..., "content": ...}`,
                or a list of conversations; or token ids: a list, a list of lists, an array `(b, t)`, or
                `{"token_ids": (b, t), "padding_mask": (b, t)}`, padded on either side. The tokenizer's chat template
                renders conversations with the beginning of an answer.
            max_length: the most tokens of a row, including the prompt.
            max_new_tokens: the most tokens after the prompt. If both limits are given, the first one reached ends the
                row. If neither is given, the limits of generation_config apply, or 20 new tokens if it has none, as in
                transformers. Without a generation_config, the limit is 128 new tokens.
            stop_token_ids: ids that end a row; None never stops. "auto" is generation_config's eos_token_id, or no stop
                token if it has none. Without a generation_config, it is the eos_token_id of the model, or else of the
                tokenizer.
            strip_prompt: whether to return only the new tokens: for a conversation, the answer.
            sampler: see `compile`; it replaces all sampling options of generation_config. None is the sampler of
                `compile`, or else that of generation_config, or else greedy.
            stop_strings: strings before which a text ends; they need a tokenizer. A match may include the text of
                special tokens, which is not returned, and may begin in the prompt.
            prefill_chunk_size: the most tokens of a prompt that one call of the model reads. Fewer take less memory and
                more calls. None is 2,048 divided by the number of rows, or 16,384 with the Triton kernels of a GPU, but
                at least 16. A longer prompt is read in equal chunks.
            state: the result of `prefill` for a text with which every prompt begins; that text is not read again.
            assistant: a `keras_jamba.generation.PromptLookup` or `DraftModel`, which proposes tokens that the model
                checks several at a time; or None. With every sampler of keras_jamba and the same seed, the outputs are
                the same as without an assistant, except where rounding decides between two tokens. Its `statistics` and
                `acceptance_rate` show its benefit. Beams do not support it. With a `capacity_factor` it is not exact,
                because tokens of one step then drop each other.

        Returns:
            For a string or a conversation, a string; for a list of them, a list of strings; without special tokens. For
            one list of ids, an int32 array; for a list of lists, a list of arrays. Each array ends with its stop token,
            if any. For an array or a dict, one array `(b, t)`, padded where the inputs were, with the pad_token_id of
            generation_config, or of the model, or 0.

        Raises:
            ValueError: for prompts without tokens, prompts longer than max_length, ids out of the vocabulary, prompts
                that do not begin with the state's prompt, an assistant that does not support the model or the sampler,
                stop strings with beams, and unknown arguments or options.

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

    def stream(self, inputs: str | Sequence[Any] | Tensors, **given: Any) -> Iterator[Any]:
        """Generates the continuation of one prompt, and yields each text piece or id as soon as it is available.

        Args:
            inputs: a string, a conversation, or a list of token ids.
            **given: the arguments of `generate` except strip_prompt. With an assistant, several tokens arrive at a
                time.

        Returns:
            An iterator. For text, it yields text pieces, whose concatenation is the result of `generate` without the
            prompt. For ids, it yields ints.

        Raises:
            ValueError: see `generate`; also for more than one prompt, and for beams.
        """
        check_keywords("stream", {name: x for name, x in given.items() if name not in _STREAM}, _STREAM)
        return api.stream(self, inputs, **{"prefill_chunk_size": None} | given)

    @_keras_internals.restored_scopes()
    def prefill(self, inputs: str | Sequence[Any] | Tensors, prefill_chunk_size: int | None = None) -> PromptState:
        """Reads one prompt, for `generate(inputs, state=...)` with inputs that begin with it.

        Args:
            inputs: a string, a conversation, or a list of token ids.
            prefill_chunk_size: see `generate`.

        Returns:
            A `PromptState`; `save(file)` writes it and `PromptState.load(file)` reads it.

        Raises:
            ValueError: see `generate`; also for more than one prompt.
        """
        return api.prefill(self, inputs, prefill_chunk_size)

    def fingerprint(self) -> str:
        """Returns a hash of the constructor arguments and the weights as text; it is the same on all backends."""
        return fingerprint(self)


def _select_tokens(features, logits_to_keep):
    """Returns the features of the tokens that `logits_to_keep` selects."""
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool):
        _checks.check_integer("logits_to_keep", logits_to_keep, at_least=0)
        return features[:, -logits_to_keep:]
    if logits_to_keep is None:
        return features
    return ops.take(features, ops.convert_to_tensor(logits_to_keep, dtype="int32"), axis=1)


def _selected_count(logits_to_keep):
    return logits_to_keep if isinstance(logits_to_keep, int | None) else len(logits_to_keep)

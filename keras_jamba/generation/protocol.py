"""The interface between generation and language models."""

from typing import Any, Protocol

from keras_jamba._typing import Tensor, Tensors


class LanguageModel(Protocol):
    """Interface of a causal language model with a cache. `JambaCausalLM` implements it.

    Attributes:
        tokenizer: an object with `encode`, `decode` and, for conversations, `apply_chat_template`; or None.
        generation_config: the dict of a generation_config.json, or None.
        sampler: the sampler of `compile`, or None.
        variables: the variables that `step` reads.
        weights: the weights. Their values are part of `fingerprint`.

    Generation stores its compiled decoders in the `__dict__` of the model, as `_decoders`.
    """

    tokenizer: Any
    generation_config: dict[str, Any] | None
    sampler: Any
    variables: list[Any]
    weights: list[Any]

    def constructor_arguments(self) -> dict[str, Any]:
        """Returns a dict with the keys vocab_size, pad_token_id, eos_token_id and transformers_config."""

    def init_cache(self, batch_size: int, max_length: int | None = None) -> Tensors:
        """Returns the cache before the first token. None means capacity for the attention window."""

    def grow_cache(self, cache: Tensors, max_length: int) -> Tensors:
        """Returns a cache that continues `cache`, with capacity for `max_length` tokens including those seen so far."""

    def step(
        self,
        inputs: dict[str, Tensor],
        cache: Tensors,
        logits_to_keep: int | None = None,
        return_rollback_state: bool = False,
    ) -> Tensors:
        """Runs the model on tokens that follow the tokens of the cache.

        Args:
            inputs: `{"token_ids": (b, t)}`, optionally with a "padding_mask" `(b, t)`.
            cache: the cache of the previous tokens.
            logits_to_keep: 1 keeps the logits of the last token, None those of all tokens.
            return_rollback_state: whether to return the rollback state as a third value.

        Returns:
            `(logits (b, t, v), cache)`, or `(logits, cache, rollback_state)`.
        """

    def rollback(self, rollback_state: Tensors, count: Tensor) -> Tensors:
        """Returns the cache after the first `count` `(b,)` tokens per row of a step."""

    def fingerprint(self) -> str:
        """Returns text that identifies the arguments and the weights of the model. It is equal on all backends."""

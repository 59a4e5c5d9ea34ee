"""What generation needs of a language model."""

from typing import Any, Protocol


class LanguageModel(Protocol):
    """A causal model of token ids with a cache; `JambaCausalLM` is one.

    Attributes:
        tokenizer: has `encode`, `decode` and, for conversations, `apply_chat_template`; or None.
        generation_config: the dict of a generation_config.json, or None.
        sampler: the sampler of `compile`, or None.
        backbone: has `with_room(cache, max_length)`, which returns a cache of a larger capacity.
        variables: the variables that `step` reads.
        weights: the weights, by which `_fingerprint` tells models from each other.
    """

    tokenizer: Any
    generation_config: dict | None
    sampler: Any
    backbone: Any
    variables: list
    weights: list

    def constructor_arguments(self):
        """Returns a dict with vocab_size, pad_token_id, eos_token_id and transformers_config."""

    def init_cache(self, batch_size, max_length):
        """Returns the cache before the first token, with capacity for `max_length` tokens."""

    def step(self, inputs, cache, logits_to_keep=None, return_rollback_state=False):
        """Returns `(logits (b, t, v), cache)` of `{"token_ids": (b, t)}` after the tokens of the cache.

        `inputs` may have a "padding_mask" `(b, t)`. `logits_to_keep=1` keeps the logits of the last token. With
        `return_rollback_state` a third value is what `rollback` takes.
        """

    def rollback(self, rollback_state, count):
        """Returns the cache after only the first `count` `(b,)` tokens of each row of a step."""

    def _fingerprint(self):
        """Returns text that differs between models with other arguments or weights, equal on all backends."""

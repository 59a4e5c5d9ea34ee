"""Assistants for speculative decoding: they propose tokens, which the model checks."""

from collections.abc import Hashable
from typing import Any

import keras
from keras import ops, tree

from keras_jamba import _backend
from keras_jamba._typing import Array, Tensor, Tensors
from keras_jamba.generation.prefilling import prefilled
from keras_jamba.generation.samplers import Sampler
from keras_jamba.ops import _checks


class Assistant:
    """Base class of assistants, which propose tokens for `generate(assistant=...)`.

    A subclass implements `propose`. A subclass with a state also implements `init_state` and `commit`.

    Args:
        num_tokens: n, the number of proposed tokens per round.

    Attributes:
        statistics: dict of counts of the last generation. `"rounds"` counts the steps in which the model checked
            proposals. `"proposed"` and `"accepted"` count tokens in all rows. Proposals beyond the end of a row, after
            a stop token or beyond the length limit, do not count.
    """

    def __init__(self, num_tokens: int) -> None:
        _checks.check_integer("num_tokens", num_tokens)
        self.num_tokens = int(num_tokens)
        self.reset()

    def reset(self) -> None:
        """Sets all `statistics` to 0."""
        self.statistics: dict[str, int] = {"rounds": 0, "proposed": 0, "accepted": 0}

    @property
    def acceptance_rate(self) -> float:
        """Share of the proposed tokens of the last generation that the model accepted. It is 0 without proposals."""
        return self.statistics["accepted"] / max(self.statistics["proposed"], 1)

    @property
    def kind(self) -> Hashable:
        """Hashable key of the assistant. Assistants with equal keys share compiled programs."""
        return type(self), id(self)

    @property
    def variables(self) -> list[keras.Variable]:
        """Variables that `propose` and `commit` read."""
        return []

    def check(self, vocab_size: int) -> None:
        """Checks that the assistant fits a model with `vocab_size` tokens.

        Raises:
            ValueError: if it does not. The base class accepts every model.
        """

    def init_state(self, token_ids: Array, mask: Array, capacity: int, chunk_size: int) -> Tensors:
        """Returns the state of the assistant after the prompts, as nested dicts of tensors.

        Args:
            token_ids, mask: `(b, t)`, the prompts, padded on the left.
            capacity: the most tokens of a row.
            chunk_size: the most tokens of a row that the assistant should read at a time.
        """
        return {}

    def propose(self, state: Tensors, tokens: Tensor, end: Tensor) -> tuple[Tensor, Tensors]:
        """Returns proposals for the next tokens.

        Args:
            state: the state, see `init_state`. It covers all tokens but the last.
            tokens: `(b, s)` int32, the prompts and the chosen tokens.
            end: `(b,)` int32, the number of tokens per row.

        Returns:
            `(proposals, proposal_state)`: proposals `(b, n)` int32, and the argument of `commit`. A row with fewer
            proposals ends in -1.
        """
        raise NotImplementedError

    def commit(self, state: Tensors, proposal_state: Tensors, count: Tensor) -> Tensors:
        """Returns the state after the accepted tokens.

        Args:
            state: the state before the round.
            proposal_state: the second output of `propose`.
            count: `(b,)`, from 0 to n + 1: how many of the n + 1 tokens to keep, which are the last token and the
                proposals.
        """
        return state


class PromptLookup(Assistant):
    """Proposes the tokens that followed an earlier occurrence of the last n-gram.

    The search covers the prompt and the new tokens. The longest n-gram wins, and the latest occurrence breaks ties. If
    the tokens that follow it reach the end of the text, they repeat from their beginning. The cost is close to zero.
    The gain is large for repeated text: summaries, corrections, code, or a model that repeats itself.

    Args:
        num_tokens: n, the number of proposed tokens per round.
        max_ngram: number of last tokens to search for. If they do not occur earlier, the search drops the first
            of them, down to one token.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> import keras_jamba
        >>> model = keras_jamba.JambaCausalLM(vocab_size=16, d_model=16, num_layers=2, mamba_ratio=1)
        >>> lookup = keras_jamba.generation.PromptLookup()
        >>> tokens = model.generate([1, 2, 3, 1, 2], max_new_tokens=8, assistant=lookup)
        >>> lookup.statistics["rounds"] <= 7
        True

    Reference:
        [Saxena (2023)](https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self, num_tokens: int = 8, max_ngram: int = 3) -> None:
        super().__init__(num_tokens)
        _checks.check_integer("max_ngram", max_ngram)
        self.max_ngram = int(max_ngram)

    @property
    def kind(self) -> Hashable:
        return type(self), self.num_tokens, self.max_ngram

    def propose(self, state: Tensors, tokens: Tensor, end: Tensor) -> tuple[Tensor, Tensors]:
        size, end = tokens.shape[1], end[:, None]
        positions = ops.arange(size, dtype="int32")[None]
        # `longest` counts the tokens up to each position that match the last tokens. The end itself is excluded.
        matches, longest = positions < end - 1, ops.zeros_like(tokens)
        for i in range(self.max_ngram):
            shifted = tokens if i == 0 else ops.pad(tokens[:, : size - i], ((0, 0), (i, 0)), constant_values=-1)
            wanted = ops.take_along_axis(tokens, ops.maximum(end - 1 - i, 0), axis=1)
            matches = ops.logical_and(matches, shifted == wanted)
            longest = longest + ops.cast(matches, "int32")
        rank = ops.where(longest > 0, longest * size + positions, -1)
        best = ops.cast(ops.argmax(rank, axis=1, keepdims=True), "int32")
        period = ops.maximum(end - 1 - best, 1)
        following = best + 1 + ops.mod(ops.arange(self.num_tokens, dtype="int32")[None], period)
        found = ops.take_along_axis(tokens, ops.minimum(following, size - 1), axis=1)
        return ops.where(ops.max(rank, axis=1, keepdims=True) >= 0, found, -1), {}


class DraftModel(Assistant):
    """Proposes the most likely tokens of a smaller model.

    The gain is large if the small model is much faster than the large model, and often agrees with it.

    Args:
        model: a `JambaCausalLM` with the same vocabulary, or an object with its `step`, `rollback` and `init_cache`.
        num_tokens: n, the number of proposed tokens per round. Each takes a step of this model.

    Raises:
        ValueError: for arguments out of range, and for a model without these methods.

    Example:
        >>> import keras_jamba
        >>> large, small = (keras_jamba.JambaCausalLM(16, d_model=d, num_layers=2, mamba_ratio=1) for d in (32, 16))
        >>> draft = keras_jamba.generation.DraftModel(small, num_tokens=2)
        >>> large.generate([1, 2, 3], max_new_tokens=8, assistant=draft).shape
        (11,)

    Reference:
        [Leviathan et al. (2023)](https://arxiv.org/abs/2211.17192). The paper draws proposals and accepts each with a
        probability. Here the model accepts a proposal if plain decoding chooses the same token.
    """

    def __init__(self, model: Any, num_tokens: int = 4) -> None:
        super().__init__(num_tokens)
        needed = ("step", "rollback", "init_cache", "constructor_arguments", "variables")
        missing = [name for name in needed if not hasattr(model, name)]
        if missing:
            raise ValueError(
                f"A draft model must have {', '.join(needed)}. Received: a {type(model).__name__} without {missing}. "
                "Pass a JambaCausalLM."
            )
        self.model = model
        self._prefill: Any = None
        self._variable_ids: tuple[int, ...] | None = None

    @property
    def kind(self) -> Hashable:
        return type(self), self.num_tokens, id(self.model), tuple(map(id, self.variables))

    @property
    def variables(self) -> list[keras.Variable]:
        return list(self.model.variables)

    def check(self, vocab_size: int) -> None:
        own = self.model.constructor_arguments()["vocab_size"]
        if own != vocab_size:
            raise ValueError(
                f"A draft model must have the vocabulary of the model, {vocab_size} tokens. Received: one of {own}. "
                "Train a small model with the same tokenizer, or use keras_jamba.generation.PromptLookup()."
            )

    def init_state(self, token_ids: Array, mask: Array, capacity: int, chunk_size: int) -> Tensors:
        variable_ids = tuple(map(id, self.variables))
        if self._variable_ids != variable_ids:
            step = lambda inputs, cache: self.model.step(inputs, cache, logits_to_keep=1)  # noqa: E731
            self._prefill = _backend.compilation.jit_inference(step, self.variables)
            self._variable_ids = variable_ids
        cache = self.model.init_cache(len(token_ids), capacity)
        return {"cache": prefilled(self._prefill, token_ids, mask, cache, chunk_size)[1]}

    def propose(self, state: Tensors, tokens: Tensor, end: Tensor) -> tuple[Tensor, Tensors]:
        def step(carry, _):
            token, cache = carry
            logits, cache, rollback_state = self.model.step({"token_ids": token}, cache, return_rollback_state=True)
            token = ops.cast(ops.argmax(logits, axis=-1), "int32")
            return (token, cache), (token, {name: block["tokens"] for name, block in rollback_state.items()})

        last = ops.take_along_axis(tokens, end[:, None] - 1, axis=1)
        # One step more than proposals: if all are accepted, the state must cover the last proposal.
        _, found = _backend.compilation.scan(step, (last, state["cache"]), ops.arange(self.num_tokens + 1))
        # Stacked outputs of n + 1 steps, `(n + 1, b, 1, ...)`, become those of one step, `(b, n + 1, ...)`.
        proposals, residuals = tree.map_structure(lambda x: ops.swapaxes(x[:, :, 0], 0, 1), found)
        return proposals[:, :-1], {name: {"cache": state["cache"][name], "tokens": x} for name, x in residuals.items()}

    def commit(self, state: Tensors, proposal_state: Tensors, count: Tensor) -> Tensors:
        return {"cache": self.model.rollback(proposal_state, count)}


def check_assistant(assistant, sampler, vocab_size):
    """Checks that an assistant fits the sampler, and a model with `vocab_size` tokens.

    Raises:
        ValueError: if it does not, or if it is not an `Assistant`.
    """
    if not isinstance(assistant, Assistant):
        raise ValueError(
            "assistant must be a keras_jamba.generation.PromptLookup, a DraftModel, or None. Received: "
            f"assistant={assistant!r}. For a model pass DraftModel(model)."
        )
    if not isinstance(sampler, Sampler):
        kind = type(getattr(sampler, "sampler", sampler))
        raise ValueError(
            "An assistant needs a keras_jamba.Sampler, which checks each of its proposals. Received: assistant="
            f"{type(assistant).__name__}, and a {kind.__name__} of {kind.__module__.split('.')[0]}, which chooses "
            "otherwise. Leave the assistant out, or pass another sampler, for example "
            "keras_jamba.Sampler(temperature=0.8)."
        )
    assistant.check(vocab_size)

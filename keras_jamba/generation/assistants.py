"""Who proposes tokens that the model need only check: speculative decoding."""

from keras import ops, tree

from keras_jamba import _backend
from keras_jamba.generation.decoding import prefilled
from keras_jamba.generation.samplers import Sampler
from keras_jamba.ops import _checks


class Assistant:
    """Proposes tokens for `generate(assistant=...)`.

    A subclass has `propose` and, where it has a state, `init_state` and `commit`.

    Args:
        num_tokens: how many tokens n are proposed at a time.

    Attributes:
        statistics: of the last generation, `"rounds"`, how often the model looked at proposals, `"proposed"` and
            `"accepted"`, how many tokens in all rows. Proposals beyond the end of a row, for a stop token or for want
            of room, do not count.
    """

    def __init__(self, num_tokens):
        _checks.check_integer("num_tokens", num_tokens)
        self.num_tokens = int(num_tokens)
        self.reset()

    def reset(self):
        self.statistics = {"rounds": 0, "proposed": 0, "accepted": 0}

    @property
    def acceptance_rate(self):
        """Which share of what was proposed in the last generation was accepted; 0 where nothing was."""
        return self.statistics["accepted"] / max(self.statistics["proposed"], 1)

    @property
    def kind(self):
        """What of it is in a compiled program."""
        return type(self), id(self)

    @property
    def variables(self):
        """Those that `propose` and `commit` read."""
        return []

    def check(self, vocab_size):
        """Refuses a model with so many tokens that it cannot help."""

    def init_state(self, token_ids, mask, capacity, chunk_size):
        """Its state after prompts `(b, t)` padded on the left, nested dicts of tensors.

        A row has at most `capacity` tokens. It should read `chunk_size` tokens at a time.
        """
        return {}

    def propose(self, state, tokens, end):
        """What may come next.

        Args:
            state: see `init_state`; it has seen all but the last token.
            tokens: `(b, s)` int32, prompts and what was chosen.
            end: `(b,)` int32, how many of these there are in each row.

        Returns:
            `(proposals (b, n) int32, proposal_state)`: -1 for no proposal, after which the row has none; and what
            `commit` takes.
        """
        raise NotImplementedError

    def commit(self, state, proposal_state, count):
        """Its state when of the last token and the proposals the first `count` `(b,)` were right, from 0 to n + 1."""
        return state


class PromptLookup(Assistant):
    """Proposes what followed when the last few tokens stood there before, in the prompt or among the new ones.

    It costs next to nothing, and pays where text comes again: in summaries, corrections, code, or with a model that
    repeats itself. The latest place counts, of the longest beginning that is found; where what followed there
    reaches the end it goes on from its own beginning, as a loop does.

    Args:
        num_tokens: how many tokens are proposed at a time.
        max_ngram: how many of the last tokens are looked for, and where these are not found one less, down to one.

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

    def __init__(self, num_tokens=8, max_ngram=3):
        super().__init__(num_tokens)
        _checks.check_integer("max_ngram", max_ngram)
        self.max_ngram = int(max_ngram)

    @property
    def kind(self):
        return type(self), self.num_tokens, self.max_ngram

    def propose(self, state, tokens, end):
        size, end = tokens.shape[1], end[:, None]
        places = ops.arange(size, dtype="int32")[None]
        # Of what ends at each place, how many tokens are those at the end; the end itself is no earlier place.
        same, longest = places < end - 1, ops.zeros_like(tokens)
        for i in range(self.max_ngram):
            there = tokens if i == 0 else ops.pad(tokens[:, : size - i], ((0, 0), (i, 0)), constant_values=-1)
            here = ops.take_along_axis(tokens, ops.maximum(end - 1 - i, 0), axis=1)
            same = ops.logical_and(same, there == here)
            longest = longest + ops.cast(same, "int32")
        rank = ops.where(longest > 0, longest * size + places, -1)
        best = ops.cast(ops.argmax(rank, axis=1, keepdims=True), "int32")
        period = ops.maximum(end - 1 - best, 1)
        following = best + 1 + ops.mod(ops.arange(self.num_tokens, dtype="int32")[None], period)
        found = ops.take_along_axis(tokens, ops.minimum(following, size - 1), axis=1)
        return ops.where(ops.max(rank, axis=1, keepdims=True) >= 0, found, -1), {}


class DraftModel(Assistant):
    """Proposes what a smaller model finds most likely.

    It pays where the small model takes a fraction of the large one's time and often agrees with it.

    Args:
        model: a `JambaCausalLM` of the same vocabulary, or what has its `step`, `rollback` and `init_cache`.
        num_tokens: how many tokens are proposed at a time, each by a step of this model.

    Raises:
        ValueError: for arguments out of range, and for a model without these methods.

    Example:
        >>> import keras_jamba
        >>> large, small = (keras_jamba.JambaCausalLM(16, d_model=d, num_layers=2, mamba_ratio=1) for d in (32, 16))
        >>> draft = keras_jamba.generation.DraftModel(small, num_tokens=2)
        >>> large.generate([1, 2, 3], max_new_tokens=8, assistant=draft).shape
        (11,)

    Reference:
        [Leviathan et al. (2023)](https://arxiv.org/abs/2211.17192). There proposals are drawn, and accepted with a
        probability; here a proposal is right where it is what plain decoding chooses.
    """

    def __init__(self, model, num_tokens=4):
        super().__init__(num_tokens)
        missing = [name for name in ("step", "rollback", "init_cache") if not callable(getattr(model, name, None))]
        if missing:
            raise ValueError(
                f"A draft model must have step, rollback and init_cache. Received: a {type(model).__name__} without "
                f"{missing}. Pass a JambaCausalLM."
            )
        self.model, self._prefill, self._read = model, None, None

    @property
    def kind(self):
        return type(self), self.num_tokens, id(self.model), tuple(map(id, self.variables))

    @property
    def variables(self):
        return list(self.model.variables)

    def check(self, vocab_size):
        own = self.model.get_config()["vocab_size"]
        if own != vocab_size:
            raise ValueError(
                f"A draft model must have the vocabulary of the model, {vocab_size} tokens. Received: one of {own}. "
                "Train a small model with the same tokenizer, or use keras_jamba.generation.PromptLookup()."
            )

    def init_state(self, token_ids, mask, capacity, chunk_size):
        read = tuple(map(id, self.variables))
        if self._read != read:
            step = lambda inputs, cache: self.model.step(inputs, cache, logits_to_keep=1)  # noqa: E731
            self._prefill, self._read = _backend.compilation.jit_inference(step, self.variables), read
        cache = self.model.init_cache(len(token_ids), capacity)
        return {"cache": prefilled(self._prefill, token_ids, mask, cache, chunk_size)[1]}

    def propose(self, state, tokens, end):
        def step(carry, _):
            token, cache = carry
            logits, cache, rollback_state = self.model.step({"token_ids": token}, cache, return_rollback_state=True)
            token = ops.cast(ops.argmax(logits, axis=-1), "int32")
            return (token, cache), (token, {name: block["tokens"] for name, block in rollback_state.items()})

        last = ops.take_along_axis(tokens, end[:, None] - 1, axis=1)
        # Once more than there are proposals: where all are right, the last of them has been seen too.
        _, found = _backend.compilation.scan(step, (last, state["cache"]), ops.arange(self.num_tokens + 1))
        # `(n + 1, b, 1, ...)` of steps in a row are `(b, n + 1, ...)` of one step.
        proposals, read = tree.map_structure(lambda x: ops.swapaxes(x[:, :, 0], 0, 1), found)
        return proposals[:, :-1], {name: {"cache": state["cache"][name], "tokens": x} for name, x in read.items()}

    def commit(self, state, proposal_state, count):
        return {"cache": self.model.rollback(proposal_state, count)}


def check_assistant(assistant, sampler, vocab_size):
    """Refuses what cannot help a model of so many tokens, or a sampler that cannot be helped.

    Raises:
        ValueError: for these.
    """
    if not isinstance(assistant, Assistant):
        raise ValueError(
            "assistant must be a keras_jamba.generation.PromptLookup, a DraftModel, or None. Received: "
            f"assistant={assistant!r}. For a model pass DraftModel(model)."
        )
    if not isinstance(sampler, Sampler):
        kind = type(getattr(sampler, "sampler", sampler))
        raise ValueError(
            "Proposals are checked against what a keras_jamba.Sampler chooses at each place. Received: assistant="
            f"{type(assistant).__name__}, and a {kind.__name__} of {kind.__module__.split('.')[0]}, which chooses "
            "otherwise. Leave the assistant out, or pass another sampler, for example "
            "keras_jamba.Sampler(temperature=0.8)."
        )
    assistant.check(vocab_size)

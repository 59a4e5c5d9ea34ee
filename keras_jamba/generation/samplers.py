"""Samplers: they choose the next token from its logits."""

import random
from typing import Any, Literal, Self

import keras
import numpy as np
from keras import ops

from keras_jamba._typing import Array, Config, Tensor
from keras_jamba.ops import _checks

# Arguments of `Sampler` per name in `compile(sampler=...)`.
NAMES: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0.0),
    "random": {},
    "top_k": dict(top_k=5),
    "top_p": dict(top_p=0.9),
    "min_p": dict(min_p=0.05),
}
# Options of samplers that callers often pass to functions with a `sampler` argument.
_OPTIONS = {
    "keras_jamba.generation.BeamSampler": ("num_beams", "length_penalty", "early_stopping"),
    "keras_jamba.Sampler": ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    "do_sample": ("do_sample",),
}
# Remedies for the argument names of other libraries.
_REMEDIES = {
    **dict.fromkeys(("max_tokens", "num_tokens"), "pass max_new_tokens"),
    "eos_token_id": "pass stop_token_ids",
    **dict.fromkeys(("stop", "stop_sequences", "stop_words"), "pass stop_strings"),
    "tokenizer": "set model.tokenizer",
    "generation_config": "set model.generation_config",
    **dict.fromkeys(("input_ids", "prompt", "prompts", "messages"), "pass the prompts first, as inputs"),
    "attention_mask": 'pass {"token_ids": ..., "padding_mask": ...} as inputs',
    "assistant_model": "pass assistant=keras_jamba.generation.DraftModel(model)",
    "streamer": "call stream",
}


@keras.saving.register_keras_serializable(package="keras_jamba")
class Sampler:
    """Draws the next token from the logits.

    The rules apply in the order of the arguments, each to the result of the previous one. NumPy draws one random
    number per token and row. Equal seeds give equal tokens on every backend, unless a number lies on the boundary
    between two tokens to within rounding.

    A subclass returns all its arguments from `get_config`: samplers with equal configurations share compiled programs.

    Args:
        repetition_penalty: divides the logits of tokens that the row already has, or multiplies negative ones. 1 has
            no effect.
        temperature: divides the logits. 0 selects the most likely token.
        top_k: keeps this number of the most likely tokens. None keeps all.
        top_p: keeps the fewest most likely tokens with at least this total probability. None keeps all.
        min_p: keeps tokens with at least this share of the highest probability. None keeps all.
        seed: an integer. None draws a new seed per generation, reproducible after `keras.utils.set_random_seed`.

    Raises:
        ValueError: for arguments out of range.

    Reference:
        [Keskar et al. (2019)](https://arxiv.org/abs/1909.05858) for the penalty,
        [Holtzman et al. (2019)](https://arxiv.org/abs/1904.09751) for top_p,
        [Nguyen et al. (2024)](https://arxiv.org/abs/2407.01082) for min_p.
    """

    def __init__(
        self,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        _checks.check_number("repetition_penalty", repetition_penalty, low=1e-3)
        _checks.check_number("temperature", temperature, low=0)
        if top_k is not None:
            _checks.check_integer("top_k", top_k)
        for name, value in dict(top_p=top_p, min_p=min_p).items():
            if value is not None:
                _checks.check_number(name, value, low=0, high=1)
        if seed is not None:
            _checks.check_integer("seed", seed, at_least=0)
        self.repetition_penalty, self.temperature = float(repetition_penalty), float(temperature)
        self.top_k, self.seed = (None if x is None else int(x) for x in (top_k, seed))
        self.top_p, self.min_p = (None if x is None else float(x) for x in (top_p, min_p))

    @property
    def needs_seen(self) -> bool:
        """Whether `choose` needs `seen`, the tokens that a row already has."""
        return self.repetition_penalty != 1.0

    def uniforms(self, count: int, rows: int) -> Array:
        """Returns one random number in [0, 1) per token and row, `(count, rows)` float32."""
        # keras.utils.set_random_seed seeds Python's generator on every backend.
        seed = random.getrandbits(64) if self.seed is None else self.seed
        # Numbers stay below 1 by more than rounding, so that the last tokens of a sum keep their probability.
        return np.random.default_rng(seed).random((count, rows), "float32") * np.float32(1 - 2**-20)

    def choose(self, logits: Tensor, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
        """Chooses the next token of each row.

        Args:
            logits: `(b, v)` float32.
            uniform: `(b,)`, a row of `uniforms`.
            seen: `(b, v)` bool, the tokens that a row already has. Only a repetition_penalty reads it.

        Returns:
            The token ids, `(b,)` int32.
        """
        if self.needs_seen:
            penalised = ops.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = ops.where(seen, penalised, logits)
        if self.temperature == 0:
            return ops.cast(ops.argmax(logits, axis=-1), "int32")
        probabilities, tokens = self._kept(logits / self.temperature)
        sums = ops.cumsum(probabilities, axis=-1)
        index = ops.sum(ops.cast(sums <= uniform[:, None] * sums[:, -1:], "int32"), axis=-1, keepdims=True)
        if tokens is None:
            return ops.cast(index[:, 0], "int32")
        return ops.cast(ops.take_along_axis(tokens, ops.cast(index, "int32"), axis=-1)[:, 0], "int32")

    def _kept(self, logits):
        """Computes the probabilities after top_k, top_p and min_p.

        Returns:
            `(probabilities, tokens)`: removed tokens have probability 0. `tokens` holds the ids of the columns, or is
            None if they are all ids in order.
        """
        tokens, size = None, logits.shape[-1]
        if self.top_k is not None or self.top_p is not None:
            logits, tokens = ops.top_k(logits, min(self.top_k or size, size))
        probabilities = ops.softmax(logits, axis=-1)
        if self.top_p is not None:
            before = ops.cumsum(probabilities, axis=-1) - probabilities
            # The most likely token stays for every top_p, also 0.
            first = ops.arange(probabilities.shape[-1])[None] == 0
            probabilities = ops.where(ops.logical_or(before < self.top_p, first), probabilities, 0.0)
        if self.min_p is not None:
            highest = ops.max(probabilities, axis=-1, keepdims=True)
            probabilities = ops.where(probabilities >= self.min_p * highest, probabilities, 0.0)
        return probabilities, tokens

    def get_config(self) -> Config:
        names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "seed")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_jamba")
class BeamSampler:
    """Beam search: an approximate search for the most likely sequence of tokens.

    The search extends `num_beams` sequences (beams) per prompt. A beam ends at a stop token or at the length limit.
    Ended beams enter a pool, which keeps the best `num_beams`. The best sequence of the pool is the result. Its score
    is the sum of the log probabilities of its tokens, divided by `number of tokens ** length_penalty`. The cost is
    that of a batch with `num_beams` rows per prompt.

    Args:
        num_beams: number of beams per prompt. 1 is greedy.
        length_penalty: from -5 to 5. Values above 0 favour longer sequences, values below 0 shorter ones.
        early_stopping: when to stop with a full pool. True stops at once. False stops when no beam has a better score
            at its current length. "never" stops when no beam could have a better score at its greatest length.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> import keras_jamba
        >>> model = keras_jamba.JambaCausalLM(vocab_size=16, d_model=16, num_layers=2, mamba_ratio=1)
        >>> model.generate([1, 2, 3], max_new_tokens=4, sampler=keras_jamba.generation.BeamSampler(num_beams=2)).shape
        (7,)

    Reference:
        [Wu et al. (2016)](https://arxiv.org/abs/1609.08144), section 7. The pool and the stopping rules are those of
        transformers.
    """

    needs_seen: bool = False

    def __init__(
        self, num_beams: int = 4, length_penalty: float = 1.0, early_stopping: bool | Literal["never"] = False
    ) -> None:
        _checks.check_integer("num_beams", num_beams)
        _checks.check_number("length_penalty", length_penalty, low=-5, high=5)
        if not isinstance(early_stopping, bool) and early_stopping != "never":
            raise ValueError(
                f"early_stopping must be True, False or 'never'. Received: early_stopping={early_stopping!r}. Pass "
                "False, the default of transformers."
            )
        self.num_beams, self.length_penalty = int(num_beams), float(length_penalty)
        self.early_stopping = early_stopping

    def uniforms(self, count: int, rows: int) -> Array:
        """Returns zeros `(count, rows)` float32: beam search draws no random numbers."""
        return np.zeros((count, rows), "float32")

    def get_config(self) -> Config:
        return {name: getattr(self, name) for name in ("num_beams", "length_penalty", "early_stopping")}

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls(**config)


class ProbabilitySampler:
    """Adapter for a keras-hub sampler with `get_next_token(probabilities)`.

    The keras-hub sampler draws its own random numbers. It runs outside compiled loops.
    """

    needs_seen = False

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def uniforms(self, count: int, rows: int) -> Array:
        return np.zeros((count, rows), "float32")

    def choose(self, logits: Tensor, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
        temperature = getattr(self.sampler, "temperature", 1.0)
        probabilities = ops.softmax(logits / temperature, axis=-1)
        return ops.cast(self.sampler.get_next_token(probabilities), "int32")


def sampler_of(given):
    """Returns the sampler for a name, a sampler of this package, or a sampler of keras-hub.

    Raises:
        ValueError: for other values.
    """
    if isinstance(given, (Sampler, BeamSampler, ProbabilitySampler)):
        return given
    if isinstance(given, str) and given in NAMES:
        return Sampler(**NAMES[given])
    if not isinstance(given, (str, type)) and _has_next_token(given):
        return ProbabilitySampler(given)
    if any(kind.__name__ == "BeamSampler" for kind in type(given).__mro__):
        raise ValueError(
            "Beam search needs a keras_jamba.generation.BeamSampler. Received: the BeamSampler of "
            f"{type(given).__module__.split('.')[0]}. Pass "
            f"keras_jamba.generation.BeamSampler(num_beams={getattr(given, 'num_beams', 4)})."
        )
    raise ValueError(
        f"sampler must be one of {list(NAMES)}, a keras_jamba.Sampler, a keras_jamba.generation.BeamSampler, or an "
        f"object with get_next_token(probabilities). Received: sampler={given!r}. For example "
        "keras_jamba.Sampler(temperature=0.7, top_p=0.9)."
    )


def check_keywords(function, unknown, known):
    """Checks that a function received no unknown keyword arguments.

    Raises:
        ValueError: if there are any. For options of a sampler, the message shows how to pass them.
    """
    if not unknown:
        return
    received = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
    kind = next((kind for kind, names in _OPTIONS.items() if any(name in unknown for name in names)), None)
    if kind is None:
        remedies = [f"Instead of {name} {_REMEDIES[name]}." for name in unknown if name in _REMEDIES]
        raise ValueError(
            f"An argument of {function} must be one of {list(known)}. Received: {received}. "
            f"{' '.join(remedies) or 'Pass one of these.'}"
        )
    if kind == "do_sample":
        remedy = "sampler=keras_jamba.Sampler() to draw tokens, or sampler='greedy' to take the most likely"
    else:
        options = {name: value for name, value in unknown.items() if name in _OPTIONS[kind]}
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        remedy = f"sampler={kind}({given})"
    raise ValueError(
        f"Options that choose tokens belong to a sampler: keras_jamba.Sampler draws tokens, "
        f"keras_jamba.generation.BeamSampler searches with beams. Received: {received}. Pass {remedy}."
    )


def _has_next_token(given):
    """Returns whether a sampler chooses tokens from probabilities alone.

    The search samplers of keras-hub inherit a `get_next_token` that only raises an error.
    """
    method = getattr(type(given), "get_next_token", None)
    base = next(
        (c for c in type(given).__mro__ if c.__module__.startswith("keras_hub") and c.__name__ == "Sampler"), None
    )
    return callable(method) and method is not getattr(base, "get_next_token", None)

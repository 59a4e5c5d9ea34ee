"""How the next token is chosen from its logits."""

import random

import keras
import numpy as np
from keras import ops

from keras_jamba.ops import _checks

# Arguments of `Sampler` by the names that `compile(sampler=...)` takes.
NAMES = {
    "greedy": dict(temperature=0.0),
    "random": {},
    "top_k": dict(top_k=5),
    "top_p": dict(top_p=0.9),
    "min_p": dict(min_p=0.05),
}
# Options of samplers, which are easily passed to what takes a sampler.
_OPTIONS = {
    "keras_jamba.generation.BeamSampler": ("num_beams", "length_penalty", "early_stopping"),
    "keras_jamba.Sampler": ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    "do_sample": ("do_sample",),
}
# What other libraries call arguments that stand here under another name.
_INSTEAD = {
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
    """Draws the next token; the rules apply in the order of the arguments, each to what the one before left.

    One number is drawn a token and row, by NumPy: equal seeds give equal tokens on every backend, but where a
    number falls between two tokens to within rounding.

    Args:
        repetition_penalty: what logits of tokens that the row has already are divided by, or multiplied where they are
            negative; 1 changes nothing.
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: only so many of the most likely tokens stay; None for all.
        top_p: the fewest most likely tokens stay whose probabilities reach this sum together; None for all.
        min_p: only tokens of at least this share of the highest probability stay; None for all.
        seed: an integer; None draws another at each generation, and repeats after `keras.utils.set_random_seed`.

    Raises:
        ValueError: for arguments out of range.

    Reference:
        [Keskar et al. (2019)](https://arxiv.org/abs/1909.05858) for the penalty,
        [Holtzman et al. (2019)](https://arxiv.org/abs/1904.09751) for top_p,
        [Nguyen et al. (2024)](https://arxiv.org/abs/2407.01082) for min_p.
    """

    def __init__(self, repetition_penalty=1.0, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=None):
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
    def needs_seen(self):
        """Whether `choose` must be told which tokens a row has already."""
        return self.repetition_penalty != 1.0

    def uniforms(self, count, rows):
        """A number from 0 to 1 for each of `count` tokens and each row, `(count, rows)` float32."""
        # Python's generator is one of those that keras.utils.set_random_seed seeds, on every backend.
        seed = random.getrandbits(64) if self.seed is None else self.seed
        # Below 1 by more than rounding: the last tokens of a sum are as likely as they should be.
        return np.random.default_rng(seed).random((count, rows), "float32") * np.float32(1 - 2**-20)

    def choose(self, logits, uniform, seen=None):
        """The next tokens.

        Args:
            logits: `(b, v)` float32.
            uniform: `(b,)`, a row of `uniforms`.
            seen: `(b, v)` bool, the tokens that a row has already; only looked at with a repetition_penalty.

        Returns:
            `(b,)` int32.
        """
        if self.needs_seen:
            penalised = ops.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = ops.where(seen, penalised, logits)
        if self.temperature == 0:
            return ops.cast(ops.argmax(logits, axis=-1), "int32")
        probabilities, tokens = self._kept(logits / self.temperature)
        sums = ops.cumsum(probabilities, axis=-1)
        place = ops.sum(ops.cast(sums <= uniform[:, None] * sums[:, -1:], "int32"), axis=-1, keepdims=True)
        if tokens is None:
            return ops.cast(place[:, 0], "int32")
        return ops.cast(ops.take_along_axis(tokens, ops.cast(place, "int32"), axis=-1)[:, 0], "int32")

    def _kept(self, logits):
        """Probabilities, 0 for tokens that do not stay, and the tokens that these are of, or None for all in order."""
        tokens, size = None, logits.shape[-1]
        if self.top_k is not None or self.top_p is not None:
            logits, tokens = ops.top_k(logits, min(self.top_k or size, size))
        probabilities = ops.softmax(logits, axis=-1)
        if self.top_p is not None:
            before = ops.cumsum(probabilities, axis=-1) - probabilities
            # The most likely one stays, whatever top_p.
            first = ops.arange(probabilities.shape[-1])[None] == 0
            probabilities = ops.where(ops.logical_or(before < self.top_p, first), probabilities, 0.0)
        if self.min_p is not None:
            highest = ops.max(probabilities, axis=-1, keepdims=True)
            probabilities = ops.where(probabilities >= self.min_p * highest, probabilities, 0.0)
        return probabilities, tokens

    def get_config(self):
        names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "seed")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_jamba")
class BeamSampler:
    """Beam search: the sequence of tokens that is most likely as a whole, of those that it looks at.

    So many beginnings of each prompt are carried on; one that ends, with a stop token or for want of room, goes into a
    pool of as many, and the best of these is the result. Its score is the sum of the logarithms of its tokens'
    probabilities over `number of tokens ** length_penalty`. It costs what a batch of so many rows costs.

    Args:
        num_beams: how many beginnings; 1 is greedy.
        length_penalty: above 0 longer sequences are favoured, below 0 shorter ones; from -5 to 5.
        early_stopping: when to stop with a full pool: True at once; False when no beam has a better score as it is;
            "never" when none could have one at its greatest length.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> import keras_jamba
        >>> model = keras_jamba.JambaCausalLM(vocab_size=16, d_model=16, num_layers=2, mamba_ratio=1)
        >>> model.generate([1, 2, 3], max_new_tokens=4, sampler=keras_jamba.generation.BeamSampler(num_beams=2)).shape
        (7,)

    Reference:
        [Wu et al. (2016)](https://arxiv.org/abs/1609.08144), section 7; pool and stopping are those of transformers.
    """

    needs_seen = False

    def __init__(self, num_beams=4, length_penalty=1.0, early_stopping=False):
        _checks.check_integer("num_beams", num_beams)
        _checks.check_number("length_penalty", length_penalty, low=-5, high=5)
        if not isinstance(early_stopping, bool) and early_stopping != "never":
            raise ValueError(
                f"early_stopping must be True, False or 'never'. Received: early_stopping={early_stopping!r}. Pass "
                "False for what transformers does unless told otherwise."
            )
        self.num_beams, self.length_penalty = int(num_beams), float(length_penalty)
        self.early_stopping = early_stopping

    def uniforms(self, count, rows):
        """Nothing is drawn."""
        return np.zeros((count, rows), "float32")

    def get_config(self):
        return {name: getattr(self, name) for name in ("num_beams", "length_penalty", "early_stopping")}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class ProbabilitySampler:
    """A sampler of keras-hub that has `get_next_token(probabilities)`, in the place of a `Sampler`.

    It keeps random numbers of its own, and is called from outside of compiled loops.
    """

    needs_seen = False

    def __init__(self, sampler):
        self.sampler = sampler

    def uniforms(self, count, rows):
        return np.zeros((count, rows), "float32")

    def choose(self, logits, uniform, seen=None):
        temperature = getattr(self.sampler, "temperature", 1.0)
        probabilities = ops.softmax(logits / temperature, axis=-1)
        return ops.cast(self.sampler.get_next_token(probabilities), "int32")


def sampler_of(given):
    """A `Sampler`, of a name, one of ours, or one of keras-hub.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(given, (Sampler, BeamSampler, ProbabilitySampler)):
        return given
    if isinstance(given, str) and given in NAMES:
        return Sampler(**NAMES[given])
    if not isinstance(given, (str, type)) and _has_next_token(given):
        return ProbabilitySampler(given)
    if any(kind.__name__ == "BeamSampler" for kind in type(given).__mro__):
        raise ValueError(
            "Beam search is keras_jamba.generation.BeamSampler here. Received: "
            f"{type(given).__module__.split('.')[0]}'s own. Pass "
            f"keras_jamba.generation.BeamSampler(num_beams={getattr(given, 'num_beams', 4)})."
        )
    raise ValueError(
        f"sampler must be one of {list(NAMES)}, a keras_jamba.Sampler, a keras_jamba.generation.BeamSampler, or an "
        f"object with get_next_token(probabilities). Received: sampler={given!r}. For example "
        "keras_jamba.Sampler(temperature=0.7, top_p=0.9)."
    )


def check_keywords(function, unknown, known):
    """Refuses keyword arguments that a function does not have; those of a sampler are shown their place.

    Raises:
        ValueError: if there are any.
    """
    if not unknown:
        return
    received = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
    kind = next((kind for kind, names in _OPTIONS.items() if any(name in unknown for name in names)), None)
    if kind is None:
        remedies = [f"Instead of {name} {_INSTEAD[name]}." for name in unknown if name in _INSTEAD]
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
        f"A sampler chooses the tokens, and has the options of the choice: keras_jamba.Sampler those of drawing, "
        f"keras_jamba.generation.BeamSampler those of beams. Received: {received}. Pass {remedy}."
    )


def _has_next_token(given):
    """Whether a sampler chooses from probabilities alone: keras-hub's searches inherit a method that only raises."""
    method = getattr(type(given), "get_next_token", None)
    base = next(
        (c for c in type(given).__mro__ if c.__module__.startswith("keras_hub") and c.__name__ == "Sampler"), None
    )
    return callable(method) and method is not getattr(base, "get_next_token", None)

"""A generation request: the resolved and checked arguments of `generate`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_jamba.generation import generation_config
from keras_jamba.generation.assistants import Assistant, check_assistant
from keras_jamba.generation.prompt_state import PromptState
from keras_jamba.generation.prompts import Prompts, prompts_of
from keras_jamba.generation.samplers import BeamSampler, sampler_of
from keras_jamba.ops import _checks

# Limit of new tokens without arguments and without a generation_config.
_DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class GenerationRequest:
    """Resolved arguments of `generate` and `stream`.

    Attributes:
        prompts: the `Prompts`.
        sampler: the sampler, which chooses the tokens.
        stop_token_ids: ids that end a row. The row includes them.
        stop_strings: strings that end a text. The text excludes them.
        pad_token_id: id that fills finished rows.
        max_new_tokens: the most new tokens of any row.
        limits: `(b,)`, the most new tokens per row.
        state: the `PromptState` of the common beginning of all prompts, or None.
        assistant: an `Assistant`, or None.
    """

    prompts: Prompts
    sampler: Any
    stop_token_ids: tuple
    stop_strings: tuple
    pad_token_id: int
    max_new_tokens: int
    limits: np.ndarray
    state: PromptState | None
    assistant: Assistant | None


def make_request(
    model,
    inputs,
    max_length=None,
    max_new_tokens=None,
    stop_token_ids="auto",
    sampler=None,
    stop_strings=None,
    state=None,
    assistant=None,
):
    """Returns the `GenerationRequest` for a `LanguageModel` and arguments of `generate`.

    Raises:
        ValueError: see `JambaCausalLM.generate`.
    """
    arguments = model.constructor_arguments()
    prompts = prompts_of(inputs, model.tokenizer, pad_token_id(model), arguments["vocab_size"])
    options = _options(model)
    if max_length is None and max_new_tokens is None and options is not None:
        max_length, max_new_tokens = generation_config.length_limits(options)
    count = _count(prompts.lengths, max_length, max_new_tokens)
    limits = count if max_length is None else np.minimum(count, max_length - prompts.lengths)
    if stop_strings is None:
        stop_strings = (options or {}).get("stop_strings") or ()
    request = GenerationRequest(
        prompts=prompts,
        sampler=_sampler(model, sampler, options),
        stop_token_ids=_stop_token_ids(model, stop_token_ids),
        stop_strings=_checked_strings(stop_strings),
        pad_token_id=pad_token_id(model),
        max_new_tokens=count,
        limits=np.broadcast_to(limits, prompts.lengths.shape),
        state=state,
        assistant=assistant,
    )
    _check_stop_strings(request, model.tokenizer)
    if assistant is not None:
        check_assistant(assistant, request.sampler, arguments["vocab_size"])
    if state is not None:
        _check_state(state, model, prompts)
    return request


def pad_token_id(model):
    """Returns the id of the padding, which also fills finished rows."""
    arguments = model.constructor_arguments()
    found = generation_config.pad_token_id(model.generation_config or {})
    inside = isinstance(found, int) and 0 <= found < arguments["vocab_size"]
    return found if inside else arguments["pad_token_id"] or 0


def _options(model):
    """Returns the generation_config, or else the generation options of a transformers config.json, or None."""
    if model.generation_config is not None:
        return model.generation_config
    return generation_config.legacy(model.constructor_arguments()["transformers_config"])


def _sampler(model, given, options):
    """Returns the first that is set: the argument, the sampler of `compile`, that of generation_config, or greedy."""
    given = model.sampler if given is None else given
    if given is not None:
        return sampler_of(given)
    return sampler_of("greedy") if options is None else generation_config.sampler_of_config(options)


def _stop_token_ids(model, stop_token_ids):
    if stop_token_ids is None:
        return ()
    if isinstance(stop_token_ids, str):
        _checks.check_choice("stop_token_ids", stop_token_ids, ("auto",))
        stop_token_ids = _own_stop_token_ids(model)
    ids = stop_token_ids.tolist() if isinstance(stop_token_ids, np.ndarray) else stop_token_ids
    ids = [i for i in (ids if isinstance(ids, (list, tuple)) else [ids]) if i is not None]
    for i in ids:
        _checks.check_integer("stop_token_ids", i, at_least=0)
    # No token has a larger id, which may not fit int32 either.
    return tuple(sorted({int(i) for i in ids if i < model.constructor_arguments()["vocab_size"]}))


def _own_stop_token_ids(model):
    """Returns the default ids that end a row."""
    if model.generation_config is not None:
        return generation_config.stop_token_ids(model.generation_config)
    own = model.constructor_arguments()["eos_token_id"]
    return getattr(model.tokenizer, "eos_token_id", None) if own is None else own


def _check_stop_strings(request, tokenizer):
    if request.stop_strings and tokenizer is None:
        raise ValueError(
            "Stop strings need a tokenizer. Received: stop_strings, and a model whose tokenizer is None. "
            "Set model.tokenizer, or pass stop_token_ids."
        )
    if request.stop_strings and isinstance(request.sampler, BeamSampler):
        raise ValueError(
            "Beam search supports no stop strings: another beam could still become better. Received: stop_strings="
            f"{list(request.stop_strings)} and a BeamSampler. Pass stop_token_ids, or another sampler."
        )


def _check_state(state, model, prompts):
    if state.model != model.fingerprint():
        raise ValueError(
            "A prompt state belongs to one model and its weights. Received: the state of another model. Prefill again."
        )
    state.check_fits(model.init_cache(1, 1))
    size = len(state.token_ids)
    for i in range(len(prompts.token_ids)):
        row = prompts.row(i)
        if len(row) < size or not np.array_equal(row[:size], state.token_ids):
            raise ValueError(
                f"Every prompt must begin with the {size} tokens of the state. Received: row {i}, "
                f"{row[:size].tolist()[:8]}... Prefill this beginning, or pass state=None."
            )


def _checked_strings(stop_strings):
    """Returns stop strings as a tuple.

    Raises:
        ValueError: if they are not a string or a list of non-empty strings.
    """
    strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(strings, (list, tuple)) or not all(isinstance(stop, str) and stop for stop in strings):
        raise ValueError(
            "stop_strings must be a string or a list of strings of at least one character. Received: stop_strings="
            f"{stop_strings!r}. For token ids pass stop_token_ids."
        )
    return tuple(strings)


def _count(lengths, max_length, max_new_tokens):
    """Returns the most new tokens of any row.

    Raises:
        ValueError: for limits out of range, and for a prompt longer than `max_length`.
    """
    if max_new_tokens is not None:
        _checks.check_integer("max_new_tokens", max_new_tokens, at_least=0)
    if max_length is None:
        return _DEFAULT_NEW_TOKENS if max_new_tokens is None else int(max_new_tokens)
    _checks.check_integer("max_length", max_length)
    if lengths.max() > max_length:
        raise ValueError(
            f"A prompt must be at most max_length tokens long. Received: {lengths.max()} tokens in row "
            f"{int(lengths.argmax())} and max_length={max_length}. Pass a larger max_length, or max_new_tokens instead."
        )
    capacity = int(max_length - lengths.min())
    return capacity if max_new_tokens is None else min(capacity, int(max_new_tokens))

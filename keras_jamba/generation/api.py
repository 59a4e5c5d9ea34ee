"""The functions `generate`, `stream` and `prefill` of a language model."""

import keras
from keras import ops

from keras_jamba._padding import padded
from keras_jamba.generation.decoder_cache import decoder_for
from keras_jamba.generation.decoding import rounded_capacity
from keras_jamba.generation.output import GeneratedRows
from keras_jamba.generation.prefilling import longest_chunk
from keras_jamba.generation.prompt_state import PromptState
from keras_jamba.generation.prompts import prompts_of
from keras_jamba.generation.request import make_request, pad_token_id
from keras_jamba.generation.samplers import BeamSampler, sampler_of
from keras_jamba.ops import _checks

# New tokens between two checks of the text for stop strings.
STOP_CHECK_INTERVAL = 16


def generate(model, inputs, strip_prompt, prefill_chunk_size, **options):
    """Generates tokens for a `LanguageModel`. See `JambaCausalLM.generate`."""
    request = make_request(model, inputs, **options)
    rows = GeneratedRows(request, model.tokenizer)
    decoder = _decoder_of(model, request)
    interval = STOP_CHECK_INTERVAL if request.stop_strings else request.max_new_tokens
    for chunk in decode(model, request, decoder, prefill_chunk_size, interval):
        rows.append(chunk)
        if all(rows.ended):
            break
    return rows.result(strip_prompt)


def stream(model, inputs, prefill_chunk_size, **options):
    """Returns an iterator over new tokens of a `LanguageModel`. See `JambaCausalLM.stream`."""
    request = make_request(model, inputs, **options)
    if not request.prompts.is_single:
        raise ValueError(
            "A stream continues one prompt. Received: a batch. Pass one string or one list of ids, or call generate."
        )
    if isinstance(request.sampler, BeamSampler):
        raise ValueError(
            "A stream yields each token at once, but only the end of the search shows the best beam. Received: "
            f"BeamSampler(num_beams={request.sampler.num_beams}). Call generate, or pass sampler='greedy'."
        )
    # Made here, not at the first token: later changes of the model do not mix with a checked request.
    rows, decoder = GeneratedRows(request, model.tokenizer), _decoder_of(model, request)
    return _stream_chunks(rows, request, decode(model, request, decoder, prefill_chunk_size, 1))


def _stream_chunks(rows, request, chunks):
    """Yields token ids, or text pieces that later tokens cannot change."""
    count = 0
    for chunk in chunks:
        rows.append(chunk)
        found = rows.settled_text() if request.prompts.is_text else rows.tokens[0]
        if request.prompts.is_text and len(found) > count:
            yield found[count:]
        elif not request.prompts.is_text:
            yield from found[count:]
        count = max(count, len(found))
        if all(rows.ended):
            break


def prefill(model, inputs, prefill_chunk_size):
    """Returns the `PromptState` of a `LanguageModel`. See `JambaCausalLM.prefill`."""
    vocab_size = model.constructor_arguments()["vocab_size"]
    prompts = prompts_of(inputs, model.tokenizer, pad_token_id(model), vocab_size)
    if not prompts.is_single:
        raise ValueError("prefill takes one prompt. Received: a batch. Pass one string or one list of ids.")
    cache = model.init_cache(1, rounded_capacity(prompts.token_ids.shape[1]))
    decoder = decoder_for(model, sampler_of("greedy"), (), pad_token_id(model))
    longest = _longest_chunk(prefill_chunk_size, rows=1)
    logits, cache = decoder.prefill(prompts.token_ids, prompts.mask, cache, longest)
    return PromptState(prompts.token_ids[0], cache, logits, model.fingerprint())


def _longest_chunk(prefill_chunk_size, rows):
    if prefill_chunk_size is None:
        return longest_chunk(rows)
    _checks.check_integer("prefill_chunk_size", prefill_chunk_size)
    return prefill_chunk_size


def _decoder_of(model, request):
    return decoder_for(model, request.sampler, request.stop_token_ids, request.pad_token_id, request.assistant)


def decode(model, request, decoder, prefill_chunk_size, interval):
    """Yields chunks with the new tokens of each row. Rows may end before the last chunk.

    Args:
        model: a `LanguageModel`.
        request: a `GenerationRequest`.
        decoder: the `Decoder` of the model for this request.
        prefill_chunk_size: the most tokens of a prompt per step of the prefill, or None for the default.
        interval: new tokens per chunk.
    """
    if request.assistant is not None:
        request.assistant.reset()
    if not request.max_new_tokens:
        return
    prompts, given = request.prompts, {}
    rows, length = prompts.token_ids.shape
    longest = _longest_chunk(prefill_chunk_size, rows)
    capacity = rounded_capacity(length + request.max_new_tokens + decoder.extra_capacity)
    logits, cache = _prefilled(model, request, decoder, capacity, longest)
    if request.assistant is not None:
        state = request.assistant.init_state(prompts.token_ids, prompts.mask, capacity, longest)
        given = dict(assistant=request.assistant, assistant_state=state, capacity=capacity)
    uniforms = request.sampler.uniforms(request.max_new_tokens, rows)
    yield from decoder.decode(logits, cache, prompts, uniforms, request.limits, interval, **given)


def _prefilled(model, request, decoder, capacity, longest):
    """Returns `(logits (b, v), cache)` after the prompts."""
    prompts, state = request.prompts, request.state
    rows = len(prompts.token_ids)
    if state is None:
        return decoder.prefill(prompts.token_ids, prompts.mask, model.init_cache(rows, capacity), longest)
    # Files store bfloat16 as float32: the cast restores the dtypes.
    template = model.init_cache(1, rounded_capacity(1))
    repeated = lambda x, y: ops.repeat(ops.cast(x, y.dtype), rows, axis=0)  # noqa: E731
    cache = model.grow_cache(keras.tree.map_structure(repeated, state.cache, template), capacity)
    logits = ops.repeat(state.logits, rows, axis=0)
    suffixes = [prompts.row(i)[len(state.token_ids) :].tolist() for i in range(rows)]
    if not any(suffixes):
        return logits, cache
    token_ids, mask = padded(suffixes)
    suffix_logits, cache = decoder.prefill(token_ids, mask, cache, longest)
    # The state holds the last logits of rows without further tokens.
    return ops.where(mask.any(axis=1)[:, None], suffix_logits, logits), cache

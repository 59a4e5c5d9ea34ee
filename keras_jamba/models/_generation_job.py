"""One generation: what was asked for, and what there is so far."""

import keras
import numpy as np
from keras import ops

from keras_jamba._padding import padded
from keras_jamba.generation import generation_config
from keras_jamba.generation.assistants import check_assistant
from keras_jamba.generation.decoding import CACHE
from keras_jamba.generation.new_text import NewText
from keras_jamba.generation.samplers import BeamSampler
from keras_jamba.ops import _checks

# How many tokens are chosen before text is looked at for stop strings.
LOOK = 16
_NEW = 128


class Job:
    """One generation: what was asked for, and what there is so far."""

    def __init__(
        self, model, inputs, max_length, max_new_tokens, stop_token_ids, sampler, stop_strings, state, assistant
    ):
        self.model, self.prompts = model, model._prompts(inputs)
        options = model._generation_options()
        if max_length is None and max_new_tokens is None and options is not None:
            max_length, max_new_tokens = generation_config.length_limits(options)
        self.count = _count(self.prompts.lengths, max_length, max_new_tokens)
        self.stops = model._stops(stop_token_ids)
        if stop_strings is None:
            stop_strings = (options or {}).get("stop_strings") or ()
        self.stop_strings = _checked_strings(stop_strings)
        if self.stop_strings and model.tokenizer is None:
            raise ValueError(
                "Stop strings need a tokenizer. Received: stop_strings, and a model whose tokenizer is None. "
                "Set model.tokenizer, or pass stop_token_ids."
            )
        self.limits = self.count if max_length is None else np.minimum(self.count, max_length - self.prompts.lengths)
        self.limits = np.broadcast_to(self.limits, self.prompts.lengths.shape)
        self.sampler = model._sampler(sampler)
        if self.stop_strings and isinstance(self.sampler, BeamSampler):
            raise ValueError(
                "Beams end with tokens: a text could end before another beam is better. Received: stop_strings="
                f"{list(self.stop_strings)} and a BeamSampler. Pass stop_token_ids, or another sampler."
            )
        if assistant is not None:
            check_assistant(assistant, self.sampler, model._config["vocab_size"])
        self.assistant, self.decoder = assistant, model._decoder(self.sampler, self.stops, assistant)
        self.state = state
        if state is not None:
            self._check_state(state)
        self.new = [[] for _ in self.prompts.lengths]
        self.ended = [limit == 0 for limit in self.limits]
        self.cut = [None for _ in self.new]
        if self.stop_strings or self.prompts.is_text:
            rows = map(self.prompts.row, range(len(self.new)))
            self.texts = [NewText(model.tokenizer, row, self.stop_strings) for row in rows]

    def _check_state(self, state):
        if state.model != self.model._fingerprint():
            raise ValueError(
                "The state of a prompt is of one model with its weights. Received: that of another model. "
                "Prefill again."
            )
        size = len(state.token_ids)
        for i in range(len(self.prompts.token_ids)):
            row = self.prompts.row(i)
            if len(row) < size or not np.array_equal(row[:size], state.token_ids):
                raise ValueError(
                    f"Every prompt must begin with the {size} tokens of the state. Received: row {i}, "
                    f"{row[:size].tolist()[:8]}... Prefill this beginning, or leave the state out."
                )

    def steps(self, prefill_chunk_size, at_a_time):
        """Chooses tokens; after each so many of them it stops to be looked at."""
        if self.assistant is not None:
            self.assistant.reset()
        if not self.count:
            return
        prompts, given = self.prompts, {}
        rows, length = prompts.token_ids.shape
        _checks.check_integer("prefill_chunk_size", prefill_chunk_size)
        room = rounded(length + self.count + self.decoder.more_room)
        logits, cache = self._prefilled(room, prefill_chunk_size)
        if self.assistant is not None:
            helper = self.assistant.begin(prompts.token_ids, prompts.mask, room, prefill_chunk_size)
            given = dict(assistant=self.assistant, helper=helper, room=room)
        uniforms = self.sampler.uniforms(self.count, rows)
        for tokens in self.decoder.pieces(logits, cache, prompts, uniforms, self.limits, at_a_time, **given):
            self._take(tokens)
            yield
            if all(self.ended):
                break

    def _prefilled(self, room, piece):
        prompts, model = self.prompts, self.model
        rows = len(prompts.token_ids)
        if self.state is None:
            return self.decoder.prefill(prompts.token_ids, prompts.mask, model.init_cache(rows, room), piece)
        # In a file bfloat16 was stored as float32.
        like = model.init_cache(1, CACHE)
        repeated = lambda x, y: ops.repeat(ops.cast(x, y.dtype), rows, axis=0)  # noqa: E731
        cache = keras.tree.map_structure(repeated, self.state.cache, like)
        cache = model.backbone.with_room(cache, room)
        size = len(self.state.token_ids)
        rest = [prompts.row(i)[size:].tolist() for i in range(rows)]
        if not any(rest):
            return ops.repeat(self.state.logits, rows, axis=0), cache
        rest = padded(rest)
        logits, cache = self.decoder.prefill(*rest, cache, piece)
        nothing = ~rest[1].any(axis=1)
        # Of a row that says nothing more, the last token was read before.
        return ops.where(nothing[:, None], ops.repeat(self.state.logits, rows, axis=0), logits), cache

    def _take(self, tokens):
        for i, row in enumerate(tokens):
            for token in row:
                if not self.ended[i]:
                    self.new[i].append(int(token))
                    self.ended[i] = int(token) in self.stops or len(self.new[i]) == self.limits[i]
            if self.stop_strings and self.cut[i] is None:
                self._look_for_stop_strings(i)

    def _look_for_stop_strings(self, i):
        new, text = self.new[i], self.texts[i]
        if text.find(new) is None:
            return
        # Later tokens were chosen before anyone looked.
        while text.find(new[:-1]) is not None:
            new.pop()
        self.cut[i], self.ended[i] = text.until(new, text.find(new)), True

    def result(self, strip_prompt):
        kind = self.prompts.kind
        if self.prompts.is_text:
            texts = [self._text(i, strip_prompt) for i in range(len(self.new))]
            return texts[0] if kind == "text" else texts
        rows = [self._ids(i, strip_prompt) for i in range(len(self.new))]
        if kind == "row":
            return rows[0]
        return rows if kind == "rows" else self._padded(strip_prompt)

    def _text(self, i, strip_prompt):
        new = self.texts[i].text(self.new[i]) if self.cut[i] is None else self.cut[i]
        return new if strip_prompt else self.model.tokenizer.decode(self.prompts.row(i)) + new

    def _ids(self, i, strip_prompt):
        before = [] if strip_prompt else self.prompts.row(i)
        return np.array([*before, *self.new[i]], "int32")

    def _padded(self, strip_prompt):
        """`(b, t)`: prompts as they stood, new tokens behind them; where padding stood on the right, in its place."""
        pad = self.model._pad_token_id()
        new, _ = padded(self.new, pad, "post")
        if strip_prompt:
            return new
        before = self.prompts.token_ids
        if not self.prompts.right:
            return np.concatenate([before, new], axis=1)
        rows = [self._ids(i, strip_prompt) for i in range(len(self.new))]
        return padded(rows, pad, "post", before.shape[1] + new.shape[1])[0]

    def pieces(self, prefill_chunk_size):
        """What comes out, one token at a time; text only when no later token can change it."""
        given = 0
        for _ in self.steps(prefill_chunk_size, 1):
            if self.prompts.kind == "row":
                yield from self.new[0][given:]
                given = len(self.new[0])
                continue
            if self.cut[0] is not None:
                text = self.cut[0]
            elif self.ended[0]:
                text = self.texts[0].text(self.new[0])
            else:
                text = self.texts[0].until(self.new[0], self.texts[0].settled(self.new[0]))
            if len(text) > given:
                yield text[given:]
                given = len(text)


def _checked_strings(stop_strings):
    """Stop strings as a tuple."""
    several = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(several, (list, tuple)) or not all(isinstance(stop, str) and stop for stop in several):
        raise ValueError(
            "stop_strings must be a string or a list of strings of at least one character. Received: stop_strings="
            f"{stop_strings!r}. For token ids pass stop_token_ids."
        )
    return tuple(several)


def _count(lengths, max_length, max_new_tokens):
    """How many tokens the row that gets most may get."""
    if max_new_tokens is not None:
        _checks.check_integer("max_new_tokens", max_new_tokens, at_least=0)
    if max_length is None:
        return _NEW if max_new_tokens is None else int(max_new_tokens)
    _checks.check_integer("max_length", max_length)
    if lengths.max() > max_length:
        raise ValueError(
            f"A prompt must be at most max_length tokens long. Received: {lengths.max()} tokens in row "
            f"{int(lengths.argmax())} and max_length={max_length}. Pass a larger max_length, or max_new_tokens instead."
        )
    room = int(max_length - lengths.min())
    return room if max_new_tokens is None else min(room, int(max_new_tokens))


def rounded(length):
    return -(-length // CACHE) * CACHE

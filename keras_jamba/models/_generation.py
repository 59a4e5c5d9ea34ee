"""Text out of a language model."""

import hashlib
import json
import zlib

import keras
import numpy as np
from keras import ops

from keras_jamba.converters.checkpoints import STATISTICS
from keras_jamba.generation.decoding import CACHE, Decoder
from keras_jamba.generation.prompts import PromptState, prompts_of
from keras_jamba.generation.samplers import sampler_of
from keras_jamba.ops import _checks

# How many tokens are chosen before text is looked at for stop strings.
_LOOK = 16
_NEW = 128
# Of so many kinds of samplers and stop tokens the programs are kept.
_PROGRAMS = 8


class Generation:
    """`generate`, `stream` and `prefill` of a model with `init_cache`, `step` and a `tokenizer`."""

    sampler = "greedy"

    def generate(
        self,
        inputs,
        max_length=None,
        max_new_tokens=None,
        stop_token_ids="auto",
        strip_prompt=False,
        sampler=None,
        stop_strings=(),
        prefill_chunk_size=512,
        state=None,
    ):
        """Goes on from prompts.

        Prompts of different lengths stand in one batch without seeing each other or their padding; each gives what it
        gives alone.

        Args:
            inputs: a string or a list of strings; token ids: a list, a list of lists, or an array `(b, t)`; or
                `{"token_ids": (b, t), "padding_mask": (b, t)}`, padded on either side.
            max_length: the most tokens of a row, the prompt included.
            max_new_tokens: the most tokens after the prompt. Where both are given the first to be reached counts; where
                none is, 128 new tokens.
            stop_token_ids: after one of these a row ends; "auto" for the model's eos_token_id or else its tokenizer's;
                None to never stop.
            strip_prompt: whether to give back the new tokens alone.
            sampler: see `compile`; None for the model's own, which is greedy unless `compile` said otherwise.
            stop_strings: before one of these a text ends; needs a tokenizer.
            prefill_chunk_size: tokens of the prompts that are read at a time: less memory for more calls.
            state: what `prefill` returned for a text with which every prompt begins; it is not read again.

        Returns:
            For a string a string, for a list of strings a list of these, special tokens left out. For one list of ids
            an int32 array, for a list of lists a list of arrays, each ending with its stop token, if any; for an array
            or a dict one array `(b, t)`, padded where the inputs were, with pad_token_id or 0.

        Raises:
            ValueError: for prompts without tokens, longer than max_length, with ids out of the vocabulary, or that do
                not begin with the state's; and for what is not understood.

        Example:
            >>> import keras_jamba
            >>> model = keras_jamba.JambaCausalLM(vocab_size=16, d_model=16, num_layers=2, mamba_ratio=1)
            >>> model.generate([[1, 2, 3]], max_new_tokens=4)[0].shape
            (7,)
        """
        job = _Job(self, inputs, max_length, max_new_tokens, stop_token_ids, sampler, stop_strings, state)
        for _ in job.steps(prefill_chunk_size, _LOOK if job.stop_strings else job.count):
            pass
        return job.result(strip_prompt)

    def stream(self, inputs, **given):
        """Goes on from one prompt, and gives each piece as soon as it is there.

        Args:
            inputs: a string, or a list of token ids.
            **given: what `generate` takes, but strip_prompt.

        Returns:
            An iterator: over pieces of text for a string, which together are what `generate` returns without the
            prompt; over ints for ids.

        Raises:
            ValueError: see `generate`; for more than one prompt too.
        """
        piece = given.pop("prefill_chunk_size", 512)
        names = ("max_length", "max_new_tokens", "stop_token_ids", "sampler", "stop_strings", "state")
        for name in given:
            _checks.check_choice("an argument of stream", name, (*names, "prefill_chunk_size"))
        defaults = {"stop_token_ids": "auto", "stop_strings": ()}
        job = _Job(self, inputs, **{name: given.get(name, defaults.get(name)) for name in names})
        if job.prompts.kind not in ("text", "row"):
            raise ValueError(
                "A stream goes on from one prompt. Received: a batch. Pass one string or one list of ids, or call "
                "generate."
            )
        return job.pieces(piece)

    def prefill(self, inputs, prefill_chunk_size=512):
        """Reads one prompt, for `generate(inputs, state=...)` with inputs that begin with it.

        Args:
            inputs: a string, or a list of token ids.
            prefill_chunk_size: see `generate`.

        Returns:
            A `PromptState`: `save(file)` and `PromptState.load(file)` keep it.

        Raises:
            ValueError: see `generate`; for more than one prompt too.
        """
        prompts = self._prompts(inputs)
        if prompts.kind not in ("text", "row"):
            raise ValueError("The state of one prompt is kept. Received: a batch. Pass one string or one list of ids.")
        cache = self.init_cache(1, _rounded(prompts.token_ids.shape[1]))
        logits, cache = self._decoder(sampler_of("greedy"), ()).prefill(
            prompts.token_ids, prompts.mask, cache, prefill_chunk_size
        )
        return PromptState(prompts.token_ids[0], cache, logits, self._fingerprint())

    def _prompts(self, inputs):
        return prompts_of(inputs, self.tokenizer, self._config["pad_token_id"] or 0, self._config["vocab_size"])

    def _stops(self, stop_token_ids):
        if stop_token_ids is None:
            return ()
        if isinstance(stop_token_ids, str):
            _checks.check_choice("stop_token_ids", stop_token_ids, ("auto",))
            own = self._config["eos_token_id"]
            stop_token_ids = getattr(self.tokenizer, "eos_token_id", None) if own is None else own
        several = stop_token_ids if isinstance(stop_token_ids, (list, tuple)) else [stop_token_ids]
        stops = tuple(sorted({int(i) for i in several if i is not None}))
        for i in stops:
            _checks.check_integer("stop_token_ids", i, at_least=0)
        return stops

    def _decoder(self, sampler, stops):
        """A `Decoder`; those made before are kept with what was compiled for them."""
        # What `enable_lora` or `quantize` changed is another program.
        variables = tuple(map(id, self.weights))
        made = self.__dict__.setdefault("_decoders", {})
        if made and next(iter(made))[0] != variables:
            made.clear()
        prefill = next(iter(made.values()))._prefill if made else None
        key = variables, _kind(sampler), stops
        if key not in made:
            step = lambda inputs, cache: self.step(inputs, cache, logits_to_keep=1)  # noqa: E731
            pad = self._config["pad_token_id"] or 0
            if len(made) == _PROGRAMS:
                del made[next(iter(made))]
            made[key] = Decoder(step, self.variables, sampler, stops, pad, prefill)
        return made[key]

    def _fingerprint(self):
        """Tells this model with its weights from others, on every backend alike."""
        config = {k: v for k, v in self.get_config().items() if k not in ("name", "dtype", "transformers_config")}
        found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for variable in sorted(self.weights, key=lambda variable: variable.path):
            if variable.path.rsplit("/", 1)[-1] in STATISTICS:
                continue
            x = np.ascontiguousarray(ops.convert_to_numpy(variable), "float32")
            found.update(f"{x.shape}{zlib.crc32(x)}".encode())
        return found.hexdigest()


def _kind(sampler):
    """What of a sampler is in a compiled program: all but its seed."""
    if not hasattr(sampler, "get_config"):
        return id(sampler.sampler)
    config = {k: v for k, v in sampler.get_config().items() if k != "seed"}
    return type(sampler), json.dumps(config, sort_keys=True, default=repr)


class _Job:
    """One generation: what was asked for, and what there is so far."""

    def __init__(self, model, inputs, max_length, max_new_tokens, stop_token_ids, sampler, stop_strings, state):
        self.model, self.prompts = model, model._prompts(inputs)
        self.count = _count(self.prompts.lengths, max_length, max_new_tokens)
        self.stops = model._stops(stop_token_ids)
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        if self.stop_strings and model.tokenizer is None:
            raise ValueError(
                "Stop strings need a tokenizer. Received: stop_strings, and a model whose tokenizer is None. "
                "Set model.tokenizer, or pass stop_token_ids."
            )
        self.limits = self.count if max_length is None else np.minimum(self.count, max_length - self.prompts.lengths)
        self.limits = np.broadcast_to(self.limits, self.prompts.lengths.shape)
        self.sampler = sampler_of(model.sampler if sampler is None else sampler)
        self.decoder = model._decoder(self.sampler, self.stops)
        self.state = state
        if state is not None:
            self._check_state(state)
        self.new = [[] for _ in self.prompts.lengths]
        self.ended = [limit == 0 for limit in self.limits]
        self.cut = [None for _ in self.new]

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
        if not self.count:
            return
        rows = len(self.prompts.token_ids)
        uniforms = self.sampler.uniforms(self.count, rows)
        logits, cache = self._prefilled(prefill_chunk_size)
        state = self.decoder.begin(logits, cache, self.prompts.token_ids, self.prompts.mask, uniforms[0])
        self._take(ops.convert_to_numpy(state["token"])[:, None])
        yield
        done = 1
        while done < self.count and not all(self.ended):
            tokens, state = self.decoder.run(state, uniforms[done : done + at_a_time])
            done += at_a_time
            self._take(tokens)
            yield

    def _prefilled(self, piece):
        prompts, model = self.prompts, self.model
        _checks.check_integer("prefill_chunk_size", piece)
        rows, length = prompts.token_ids.shape
        room = _rounded(length + self.count)
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
        rest = prompts_rest(rest)
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
        text = self._new_text(i)
        places = [place for place in (text.find(stop) for stop in self.stop_strings) if place >= 0]
        if places:
            self.cut[i], self.ended[i] = text[: min(places)], True
            while self.new[i] and any(stop in self._new_text(i, len(self.new[i]) - 1) for stop in self.stop_strings):
                self.new[i].pop()

    def result(self, strip_prompt):
        kind = self.prompts.kind
        if kind in ("text", "texts"):
            texts = [self._text(i, strip_prompt) for i in range(len(self.new))]
            return texts[0] if kind == "text" else texts
        rows = [self._ids(i, strip_prompt) for i in range(len(self.new))]
        if kind == "row":
            return rows[0]
        return rows if kind == "rows" else self._padded(strip_prompt)

    def _text(self, i, strip_prompt):
        new = self._new_text(i) if self.cut[i] is None else self.cut[i]
        return new if strip_prompt else self.model.tokenizer.decode(self.prompts.row(i)) + new

    def _new_text(self, i, count=None):
        """What the first `count` new tokens add to the text: by themselves some begin without their space."""
        decode, row = self.model.tokenizer.decode, self.prompts.row(i)
        before = decode(row)
        whole = decode([*row, *self.new[i][:count]])
        # A prompt may end in the middle of a character.
        return whole[len(before) :] if whole.startswith(before) else decode(self.new[i][:count])

    def _ids(self, i, strip_prompt):
        before = [] if strip_prompt else self.prompts.row(i)
        return np.array([*before, *self.new[i]], "int32")

    def _padded(self, strip_prompt):
        """`(b, t)`: prompts as they stood, new tokens behind them; where padding stood on the right, in its place."""
        pad = self.model._config["pad_token_id"] or 0
        longest = max(map(len, self.new))
        length = self.prompts.token_ids.shape[1] + longest
        if strip_prompt:
            found = np.full((len(self.new), longest), pad, "int32")
            for i, new in enumerate(self.new):
                found[i, : len(new)] = new
            return found
        found = np.full((len(self.new), length), pad, "int32")
        for i, new in enumerate(self.new):
            row = self.prompts.row(i)
            begin = 0 if self.prompts.right else length - longest - len(row)
            found[i, begin : begin + len(row)] = row
            found[i, begin + len(row) : begin + len(row) + len(new)] = new
        return found

    def pieces(self, prefill_chunk_size):
        """What comes out, one token at a time; text only when no later token can change it."""
        given = 0
        for _ in self.steps(prefill_chunk_size, 1):
            if self.prompts.kind == "row":
                yield from self.new[0][given:]
                given = len(self.new[0])
                continue
            text = self._new_text(0) if self.cut[0] is None else self.cut[0]
            safe = len(text) if self.ended[0] else self._safe(text)
            if safe > given:
                yield text[given:safe]
                given = safe

    def _safe(self, text):
        """How much of a text stays: no half of a character, and no beginning of a stop string."""
        end = len(text)
        while end and text[end - 1] == "\ufffd":
            end -= 1
        for stop in self.stop_strings:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text[:end].endswith(stop[:size]):
                    end -= size
                    break
        return end


def prompts_rest(rows):
    """`(token_ids, mask)` of rows of ids, some of which may be empty, padded on the left."""
    length = max(map(len, rows))
    token_ids, mask = np.zeros((len(rows), length), "int32"), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        token_ids[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    return token_ids, mask


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


def _rounded(length):
    return -(-length // CACHE) * CACHE

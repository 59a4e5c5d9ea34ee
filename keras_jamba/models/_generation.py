"""Text out of a language model."""

import hashlib
import json
import threading
import zlib

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.converters.checkpoints import STATISTICS
from keras_jamba.generation import generation_config
from keras_jamba.generation.beams import BeamDecoder
from keras_jamba.generation.decoding import Decoder
from keras_jamba.generation.prompts import PromptState, prompts_of
from keras_jamba.generation.samplers import BeamSampler, check_keywords, sampler_of
from keras_jamba.generation.speculation import SpeculativeDecoder
from keras_jamba.models._generation_job import LOOK, Job, rounded
from keras_jamba.ops import _checks

# Of so many kinds of samplers and stop tokens the programs are kept.
_PROGRAMS = 8
# Of `_decoders`, which threads share. No model holds a lock: a copy or a pickle could not take it along.
_lock = threading.Lock()
_ARGUMENTS = (
    *("max_length", "max_new_tokens", "stop_token_ids", "strip_prompt", "sampler", "stop_strings"),
    *("prefill_chunk_size", "state", "assistant"),
)


class Generation:
    """`generate`, `stream` and `prefill` of a model with `init_cache`, `step` and a `tokenizer`."""

    # What `compile` was given; None for what generation_config says, or greedy.
    sampler = None

    def generate(
        self,
        inputs,
        max_length=None,
        max_new_tokens=None,
        stop_token_ids="auto",
        strip_prompt=False,
        sampler=None,
        stop_strings=None,
        prefill_chunk_size=512,
        state=None,
        assistant=None,
        **unknown,
    ):
        """Goes on from prompts.

        What is not passed is as the model's `generation_config` says, the dict of a checkpoint's
        generation_config.json, which transformers follows too: stop tokens, lengths, stop strings, and the sampler
        unless `compile` was given one. Prompts of different lengths stand in one batch without seeing each other or
        their padding; each gives what it gives alone.

        Args:
            inputs: a string or a list of strings; a conversation, a list of `{"role": ..., "content": ...}`, or a list
                of conversations, which the tokenizer's chat template renders with the beginning of an answer; token
                ids: a list, a list of lists, or an array `(b, t)`; or
                `{"token_ids": (b, t), "padding_mask": (b, t)}`, padded on either side.
            max_length: the most tokens of a row, the prompt included.
            max_new_tokens: the most tokens after the prompt. Where both are given the first to be reached counts.
                Where none is, those of generation_config count, which is 20 new tokens where it names none, as in
                transformers; without a generation_config, 128 new tokens.
            stop_token_ids: after one of these a row ends; None to never stop. "auto" is generation_config's
                eos_token_id, none where it names none; without a generation_config the model's eos_token_id, or else
                the tokenizer's.
            strip_prompt: whether to give back the new tokens alone: of a conversation the answer.
            sampler: see `compile`; it replaces all that generation_config says about the choice of tokens. None for
                the sampler of `compile`, or else generation_config's, or else greedy.
            stop_strings: before one of these a text ends; needs a tokenizer. The text of special tokens counts, though
                it is not given back. A stop string may begin in the prompt.
            prefill_chunk_size: tokens of the prompts that are read at a time: less memory for more calls.
            state: what `prefill` returned for a text with which every prompt begins; it is not read again.
            assistant: a `keras_jamba.generation.PromptLookup` or `DraftModel`, which proposes tokens that the model
                checks several at a time; or None. What comes out is what comes out without, with every sampler of ours
                and the same seed, but where rounding decides between two tokens; its `statistics` and
                `acceptance_rate` tell whether it helped. Not for beams, and not exact with a `capacity_factor`, under
                which tokens that are read together drop each other.

        Returns:
            For a string or a conversation a string, for a list of them a list of these, special tokens left out. For
            one list of ids an int32 array, for a list of lists a list of arrays, each ending with its stop token, if
            any; for an array or a dict one array `(b, t)`, padded where the inputs were, with the pad_token_id of
            generation_config, or of the model, or 0.

        Raises:
            ValueError: for prompts without tokens, longer than max_length, with ids out of the vocabulary, or that do
                not begin with the state's; for an assistant that cannot help this model or this sampler, stop strings
                with beams; and for what is not understood.

        Example:
            >>> import keras_jamba
            >>> model = keras_jamba.JambaCausalLM(vocab_size=16, d_model=16, num_layers=2, mamba_ratio=1)
            >>> model.generate([[1, 2, 3]], max_new_tokens=4)[0].shape
            (7,)
        """
        check_keywords("generate", unknown, _ARGUMENTS)
        job = Job(self, inputs, max_length, max_new_tokens, stop_token_ids, sampler, stop_strings, state, assistant)
        for _ in job.steps(prefill_chunk_size, LOOK if job.stop_strings else job.count):
            pass
        return job.result(strip_prompt)

    def stream(self, inputs, **given):
        """Goes on from one prompt, and gives each piece as soon as it is there.

        Args:
            inputs: a string, a conversation, or a list of token ids.
            **given: what `generate` takes, but strip_prompt. With an assistant tokens come several at a time.

        Returns:
            An iterator: over pieces of text for a string, which together are what `generate` returns without the
            prompt; over ints for ids.

        Raises:
            ValueError: see `generate`; for more than one prompt, and for beams too.
        """
        names = [name for name in _ARGUMENTS if name != "strip_prompt"]
        check_keywords("stream", {name: x for name, x in given.items() if name not in names}, names)
        piece = given.pop("prefill_chunk_size", 512)
        given = {name: None for name in names if name != "prefill_chunk_size"} | {"stop_token_ids": "auto"} | given
        job = Job(self, inputs, **given)
        if not job.prompts.is_single:
            raise ValueError(
                "A stream goes on from one prompt. Received: a batch. Pass one string or one list of ids, or call "
                "generate."
            )
        if isinstance(job.sampler, BeamSampler):
            raise ValueError(
                "A stream gives each token when it is chosen, of beams the best is known at the end. Received: "
                f"BeamSampler(num_beams={job.sampler.num_beams}). Call generate, or pass sampler='greedy'."
            )
        return job.pieces(piece)

    def prefill(self, inputs, prefill_chunk_size=512):
        """Reads one prompt, for `generate(inputs, state=...)` with inputs that begin with it.

        Args:
            inputs: a string, a conversation, or a list of token ids.
            prefill_chunk_size: see `generate`.

        Returns:
            A `PromptState`: `save(file)` and `PromptState.load(file)` keep it.

        Raises:
            ValueError: see `generate`; for more than one prompt too.
        """
        prompts = self._prompts(inputs)
        if not prompts.is_single:
            raise ValueError("The state of one prompt is kept. Received: a batch. Pass one string or one list of ids.")
        cache = self.init_cache(1, rounded(prompts.token_ids.shape[1]))
        logits, cache = self._decoder(sampler_of("greedy"), ()).prefill(
            prompts.token_ids, prompts.mask, cache, prefill_chunk_size
        )
        return PromptState(prompts.token_ids[0], cache, logits, self._fingerprint())

    def _prompts(self, inputs):
        return prompts_of(inputs, self.tokenizer, self._pad_token_id(), self._config["vocab_size"])

    def _generation_options(self):
        """generation_config, or what a config.json of transformers says in its place, or None."""
        if self.generation_config is not None:
            return self.generation_config
        return generation_config.legacy(self._config["transformers_config"])

    def _sampler(self, given=None):
        """The sampler that applies."""
        given = self.sampler if given is None else given
        if given is not None:
            return sampler_of(given)
        options = self._generation_options()
        return sampler_of("greedy") if options is None else generation_config.sampler_of_config(options)

    def _pad_token_id(self):
        """What is written behind the end of a row, and where there is no token."""
        found = generation_config.pad_token_id(self.generation_config or {})
        inside = isinstance(found, int) and 0 <= found < self._config["vocab_size"]
        return found if inside else self._config["pad_token_id"] or 0

    def _stops(self, stop_token_ids):
        if stop_token_ids is None:
            return ()
        if isinstance(stop_token_ids, str):
            _checks.check_choice("stop_token_ids", stop_token_ids, ("auto",))
            stop_token_ids = self._own_stops()
        several = stop_token_ids.tolist() if isinstance(stop_token_ids, np.ndarray) else stop_token_ids
        several = [i for i in (several if isinstance(several, (list, tuple)) else [several]) if i is not None]
        for i in several:
            _checks.check_integer("stop_token_ids", i, at_least=0)
        return tuple(sorted({int(i) for i in several}))

    def _own_stops(self):
        """The ids that end a text, where none are passed."""
        if self.generation_config is not None:
            return generation_config.stop_token_ids(self.generation_config)
        own = self._config["eos_token_id"]
        return getattr(self.tokenizer, "eos_token_id", None) if own is None else own

    def _decoder(self, sampler, stops, assistant=None):
        """A decoder; those made before are kept with what was compiled for them."""
        with _lock:
            return self._kept_decoder(sampler, stops, assistant)

    def _kept_decoder(self, sampler, stops, assistant):
        # What `enable_lora` or `quantize` changed is another program.
        variables = tuple(map(id, self.weights))
        made = self.__dict__.setdefault("_decoders", {})
        if made and next(iter(made))[0] != variables:
            made.clear()
        prefill = next(iter(made.values()))._prefill if made else None
        pad = self._pad_token_id()
        key = variables, _kind(sampler), stops, pad, None if assistant is None else assistant.kind
        if key not in made:
            kind, given = BeamDecoder if isinstance(sampler, BeamSampler) else Decoder, {}
            if assistant is not None:
                check = lambda inputs, cache: self.step(inputs, cache, return_rollback_state=True)  # noqa: E731
                kind, given = SpeculativeDecoder, dict(check=check, rollback=self.rollback, assistant=assistant)
            step = lambda inputs, cache: self.step(inputs, cache, logits_to_keep=1)  # noqa: E731
            if len(made) == _PROGRAMS:
                del made[next(iter(made))]
            made[key] = kind(step, self.variables, sampler, stops, pad, prefill, **given)
        return made[key]

    def _fingerprint(self):
        """Tells this model with its weights from others, on every backend alike."""
        config = {k: v for k, v in self.constructor_arguments().items() if k != "transformers_config"}
        found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        variables = sorted(self.weights, key=lambda variable: variable.path)
        variables = [v for v in variables if v.path.rsplit("/", 1)[-1] not in STATISTICS]
        with _backend.trainer.readable_values(variables) as values:
            for value in values:
                x = np.ascontiguousarray(ops.convert_to_numpy(value), "float32")
                found.update(f"{x.shape}{zlib.crc32(x)}".encode())
        return found.hexdigest()


def _kind(sampler):
    """What of a sampler is in a compiled program: all but its seed."""
    if not hasattr(sampler, "get_config"):
        return id(sampler.sampler)
    config = {k: v for k, v in sampler.get_config().items() if k != "seed"}
    return type(sampler), json.dumps(config, sort_keys=True, default=repr)

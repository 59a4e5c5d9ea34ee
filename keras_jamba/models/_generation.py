"""Text out of a language model."""

import hashlib
import json
import zlib

import numpy as np
from keras import ops

from keras_jamba.converters.checkpoints import STATISTICS
from keras_jamba.generation.beams import BeamDecoder
from keras_jamba.generation.decoding import Decoder
from keras_jamba.generation.prompts import PromptState, prompts_of
from keras_jamba.generation.samplers import BeamSampler, sampler_of
from keras_jamba.generation.speculation import SpeculativeDecoder
from keras_jamba.models._generation_job import LOOK, Job, rounded
from keras_jamba.ops import _checks

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
        assistant=None,
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
            assistant: a `keras_jamba.generation.PromptLookup` or `DraftModel`, which proposes tokens that the model
                checks several at a time; or None. What comes out is what comes out without, with every sampler of ours
                and the same seed, but where rounding decides between two tokens; its `statistics` and
                `acceptance_rate` tell whether it helped. Not for beams, and not exact with a `capacity_factor`, under
                which tokens that are read together drop each other.

        Returns:
            For a string a string, for a list of strings a list of these, special tokens left out. For one list of ids
            an int32 array, for a list of lists a list of arrays, each ending with its stop token, if any; for an array
            or a dict one array `(b, t)`, padded where the inputs were, with pad_token_id or 0.

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
        job = Job(self, inputs, max_length, max_new_tokens, stop_token_ids, sampler, stop_strings, state, assistant)
        for _ in job.steps(prefill_chunk_size, LOOK if job.stop_strings else job.count):
            pass
        return job.result(strip_prompt)

    def stream(self, inputs, **given):
        """Goes on from one prompt, and gives each piece as soon as it is there.

        Args:
            inputs: a string, or a list of token ids.
            **given: what `generate` takes, but strip_prompt. With an assistant tokens come several at a time.

        Returns:
            An iterator: over pieces of text for a string, which together are what `generate` returns without the
            prompt; over ints for ids.

        Raises:
            ValueError: see `generate`; for more than one prompt, and for beams too.
        """
        piece = given.pop("prefill_chunk_size", 512)
        names = ("max_length", "max_new_tokens", "stop_token_ids", "sampler", "stop_strings", "state", "assistant")
        for name in given:
            _checks.check_choice("an argument of stream", name, (*names, "prefill_chunk_size"))
        defaults = {"stop_token_ids": "auto", "stop_strings": ()}
        job = Job(self, inputs, **{name: given.get(name, defaults.get(name)) for name in names})
        if job.prompts.kind not in ("text", "row"):
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
        cache = self.init_cache(1, rounded(prompts.token_ids.shape[1]))
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

    def _decoder(self, sampler, stops, assistant=None):
        """A decoder; those made before are kept with what was compiled for them."""
        # What `enable_lora` or `quantize` changed is another program.
        variables = tuple(map(id, self.weights))
        made = self.__dict__.setdefault("_decoders", {})
        if made and next(iter(made))[0] != variables:
            made.clear()
        prefill = next(iter(made.values()))._prefill if made else None
        key = variables, _kind(sampler), stops, None if assistant is None else assistant.kind
        if key not in made:
            kind, given = BeamDecoder if isinstance(sampler, BeamSampler) else Decoder, {}
            if assistant is not None:
                check = lambda inputs, cache: self.step(inputs, cache, return_trail=True)  # noqa: E731
                kind, given = SpeculativeDecoder, dict(check=check, rollback=self.rollback, assistant=assistant)
            step = lambda inputs, cache: self.step(inputs, cache, logits_to_keep=1)  # noqa: E731
            pad = self._config["pad_token_id"] or 0
            if len(made) == _PROGRAMS:
                del made[next(iter(made))]
            made[key] = kind(step, self.variables, sampler, stops, pad, prefill, **given)
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

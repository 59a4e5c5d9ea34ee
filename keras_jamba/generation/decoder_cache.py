"""The decoders of a model, kept with the programs that were compiled for them."""

import json
import threading

from keras_jamba.generation.beams import BeamDecoder
from keras_jamba.generation.decoding import Decoder
from keras_jamba.generation.samplers import BeamSampler
from keras_jamba.generation.speculation import SpeculativeDecoder

_MAX_DECODERS = 8
# One lock for all models: a model with a lock could not be copied or pickled.
_lock = threading.Lock()


def decoder_for(model, sampler, stop_token_ids, pad_token_id, assistant=None):
    """Returns a decoder of a `LanguageModel`, the one of before where nothing that is compiled differs.

    The seed of the sampler is no part of a program. `enable_lora` and `quantize` change the variables: decoders of
    before are dropped.
    """
    variables = tuple(map(id, model.weights))
    kind = None if assistant is None else assistant.kind
    key = variables, _sampler_kind(sampler), stop_token_ids, pad_token_id, kind
    with _lock:
        decoders = vars(model).setdefault("_decoders", {})
        if decoders and next(iter(decoders))[0] != variables:
            decoders.clear()
        if key not in decoders:
            if len(decoders) == _MAX_DECODERS:
                del decoders[next(iter(decoders))]
            decoders[key] = _new_decoder(model, sampler, stop_token_ids, pad_token_id, assistant, decoders)
        return decoders[key]


def _new_decoder(model, sampler, stop_token_ids, pad_token_id, assistant, decoders):
    step = lambda inputs, cache: model.step(inputs, cache, logits_to_keep=1)  # noqa: E731
    # All decoders of a model prefill with the same program.
    compiled_step = next(iter(decoders.values())).compiled_step if decoders else None
    given = (step, model.variables, sampler, stop_token_ids, pad_token_id, compiled_step)
    if assistant is not None:
        check = lambda inputs, cache: model.step(inputs, cache, return_rollback_state=True)  # noqa: E731
        return SpeculativeDecoder(*given, check=check, rollback=model.rollback, assistant=assistant)
    return BeamDecoder(*given) if isinstance(sampler, BeamSampler) else Decoder(*given)


def _sampler_kind(sampler):
    """Returns what of a sampler is in a compiled program: all but its seed."""
    if not hasattr(sampler, "get_config"):
        return id(sampler.sampler)
    config = {name: value for name, value in sampler.get_config().items() if name != "seed"}
    return type(sampler), json.dumps(config, sort_keys=True, default=repr)

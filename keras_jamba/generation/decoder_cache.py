"""A cache of the decoders of a model, with their compiled programs."""

import functools
import json
import threading

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.generation.beams import BeamDecoder
from keras_jamba.generation.decoding import Decoder
from keras_jamba.generation.samplers import BeamSampler
from keras_jamba.generation.speculation import SpeculativeDecoder

_MAX_DECODERS = 8
# One lock for all models: a model with a lock could not be copied or pickled.
_lock = threading.Lock()


def decoder_for(model, sampler, stop_token_ids, pad_token_id, assistant=None):
    """Returns a decoder of a `LanguageModel`. Requests that compile to equal programs share one decoder.

    The seed of the sampler is not part of a program. `enable_lora` and `quantize` change the variables: the cache
    then drops all earlier decoders.
    """
    _backend.compilation.use_persistent_cache()
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
            # Under the lock: threads must not make two programs of one decoder.
            decoders[key].prepare()
        return decoders[key]


def _new_decoder(model, sampler, stop_token_ids, pad_token_id, assistant, decoders):
    step = functools.partial(model.step, logits_to_keep=1)
    # All decoders of a model share one compiled step for the prefill.
    compiled_step = next(iter(decoders.values())).compiled_step if decoders else None
    is_known = _backend.compilation.has_known_step(model)
    given = (step, model.variables, sampler, stop_token_ids, pad_token_id, compiled_step, is_known)
    if assistant is not None:
        check = functools.partial(model.step, return_rollback_state=True)
        return SpeculativeDecoder(*given, check=check, rollback=model.rollback, assistant=assistant)
    return BeamDecoder(*given) if isinstance(sampler, BeamSampler) else Decoder(*given)


def _sampler_kind(sampler):
    """Returns the key of a sampler in compiled programs: its class and all arguments but the seed."""
    if not hasattr(sampler, "get_config"):
        return id(sampler.sampler)
    config = {name: value for name, value in sampler.get_config().items() if name != "seed"}
    return type(sampler), json.dumps(config, sort_keys=True, default=_text)


def _text(value):
    """Returns a text that differs for different values. The `repr` of a long array leaves elements out."""
    if hasattr(value, "__array__"):
        array = np.asarray(ops.convert_to_numpy(value))
        return [str(array.dtype), array.tolist()]
    return repr(value)

"""generation_config.json: what transformers' `generate` does by default with a checkpoint, read for ours."""

import json
from pathlib import Path

from keras_jamba import _files
from keras_jamba.generation.samplers import BeamSampler, Sampler

FILE = "generation_config.json"
# How many new tokens there are at most where the file names no length.
NEW_TOKENS = 20
# What changes tokens under transformers and cannot be followed here, with the values that change nothing beside None.
_UNSUPPORTED = {
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "constraints": (),
    "force_words_ids": (),
    "max_time": (),
    "token_healing": (False,),
}
# These count in sampling alone.
_UNSUPPORTED_IN_SAMPLING = {"typical_p": (1,), "top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,)}
# What a config.json of before the file had a place of its own may say of it.
_LEGACY = {
    *("max_length", "max_new_tokens", "do_sample", "num_beams", "early_stopping", "length_penalty", "temperature"),
    *("top_k", "top_p", "min_p", "repetition_penalty", "stop_strings", *_UNSUPPORTED, *_UNSUPPORTED_IN_SAMPLING),
}


def read(folder):
    """The generation_config.json of a folder as a dict, or None where there is none.

    Raises:
        ValueError: if it is not one JSON object.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
        problem = None if isinstance(config, dict) else type(config).__name__
    except ValueError as error:
        problem = error
    if problem is not None:
        raise ValueError(
            f"{FILE} must hold one JSON object. Received: {str(file)!r}, {problem}. Download the checkpoint again, or "
            "remove the file."
        )
    return config


def write(config, folder):
    """Writes what `read` reads."""
    _files.write_json(Path(folder) / FILE, config, ensure_ascii=False, sort_keys=True)


def legacy(model_config):
    """What transformers reads of a config.json where there is no generation_config.json; None if it says nothing."""
    found = {name: x for name, x in (model_config or {}).items() if name in _LEGACY and x is not None}
    return found or None


def sampler_of_config(config):
    """How transformers' `generate` chooses tokens under a generation_config.json.

    Args:
        config: the dict.

    Returns:
        A `Sampler`: greedy without do_sample, whatever temperature, top_k, top_p and min_p are; else with these, of
        which top_k is 50 where the file is silent. With num_beams above 1, a `BeamSampler`.

    Raises:
        ValueError: for options that cannot be followed, and for values out of range.
    """
    of = lambda name, default: default if config.get(name) is None else config[name]  # noqa: E731
    sampling, beams = bool(of("do_sample", False)), of("num_beams", 1)
    _check_supported(config, sampling, beams)
    try:
        if beams != 1:
            return BeamSampler(beams, of("length_penalty", 1.0), of("early_stopping", False))
        penalty = of("repetition_penalty", 1.0)
        if not sampling:
            return Sampler(repetition_penalty=penalty, temperature=0.0)
        if of("temperature", 1.0) == 0:
            raise ValueError(
                "With do_sample the temperature must be above 0. Received: temperature=0. Set do_sample to false."
            )
        # At 1 top_p keeps all tokens, but would sort them.
        top_p = None if of("top_p", 1.0) == 1 else config["top_p"]
        return Sampler(penalty, of("temperature", 1.0), of("top_k", 50) or None, top_p, config.get("min_p"))
    except ValueError as error:
        raise ValueError(f"{error} This was read from {FILE}: change model.generation_config.") from error


def _check_supported(config, sampling, beams):
    neutral = _UNSUPPORTED | (_UNSUPPORTED_IN_SAMPLING if sampling else {})
    if beams != 1:
        neutral = neutral | {"repetition_penalty": (1,), "do_sample": (False,)}
    wrong = {name: config[name] for name in neutral if config.get(name) is not None}
    wrong = {name: value for name, value in wrong.items() if value not in neutral[name]}
    if wrong:
        more = f" with num_beams={beams}" if beams != 1 else ""
        raise ValueError(
            f"generate follows {FILE}, but for some options that it does not have. Received: "
            f"{', '.join(f'{name}={value!r}' for name, value in wrong.items())}{more}. Pass sampler=, for example "
            "'greedy', which replaces all that the file says about the choice of tokens; or delete the options from "
            "model.generation_config."
        )


def stop_token_ids(config):
    """The ids that end a row, a list; those below 0 are no tokens, and end none."""
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return [i for i in ids if i is not None and not (isinstance(i, int) and i < 0)]


def pad_token_id(config):
    """What transformers writes behind the end of a row: the token for padding, or else the first that ends one."""
    found = config.get("pad_token_id")
    return next(iter(stop_token_ids(config)), None) if found is None else found


def length_limits(config):
    """`(max_length, max_new_tokens)`, of which one is None: the latter counts before the former."""
    if config.get("max_new_tokens") is not None:
        return None, config["max_new_tokens"]
    return (None, NEW_TOKENS) if config.get("max_length") is None else (config["max_length"], None)

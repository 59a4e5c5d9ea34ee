"""Support for generation_config.json, the default options of `generate` in transformers for a checkpoint."""

import numbers
from pathlib import Path

import numpy as np

from keras_jamba import _files
from keras_jamba.generation.samplers import BeamSampler, Sampler

FILE = "generation_config.json"
# Limit of new tokens if the file sets no length.
NEW_TOKENS = 20
# Unsupported options that change tokens in transformers, with their neutral values. None is neutral for all.
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
# Unsupported options that only apply with do_sample.
_UNSUPPORTED_IN_SAMPLING = {"typical_p": (1,), "top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,)}
# Generation options in a config.json of older checkpoints, which have no generation_config.json.
_LEGACY = {
    *("max_length", "max_new_tokens", "do_sample", "num_beams", "early_stopping", "length_penalty", "temperature"),
    *("top_k", "top_p", "min_p", "repetition_penalty", "stop_strings", *_UNSUPPORTED, *_UNSUPPORTED_IN_SAMPLING),
}


def read(folder):
    """Returns the generation_config.json of a folder as a dict, or None if the folder has none.

    Raises:
        ValueError: if the file does not hold one JSON object.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    try:
        config = _files.read_json(file)
        problem = None if isinstance(config, dict) else type(config).__name__
    except (OSError, ValueError) as error:
        problem = error
    if problem is not None:
        raise ValueError(
            f"{FILE} must hold one JSON object. Received: {str(file)!r}, {problem}. Download the checkpoint again, or "
            "remove the file."
        )
    return config


def write(config, folder):
    """Writes a dict to the generation_config.json of a folder. See `read`.

    Raises:
        ValueError: for a value that JSON cannot express, other than NumPy's numbers.
    """
    _files.write_json(Path(folder) / FILE, config, ensure_ascii=False, sort_keys=True, default=_plain)


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    raise ValueError(
        f"generation_config must hold numbers, texts, lists and dicts. Received: {value!r}. Change "
        "model.generation_config."
    )


def legacy(model_config):
    """Returns the generation options that transformers reads from a config.json, or None if it has none."""
    found = {name: x for name, x in (model_config or {}).items() if name in _LEGACY and x is not None}
    return found or None


def sampler_of_config(config):
    """Returns the sampler that chooses tokens like `generate` of transformers with a generation_config.json.

    Args:
        config: the dict of the file.

    Returns:
        A `Sampler`. Without do_sample it is greedy, and ignores temperature, top_k, top_p and min_p. With do_sample it
        uses them, and top_k defaults to 50. With num_beams above 1, a `BeamSampler`.

    Raises:
        ValueError: for unsupported options, and for values out of range.
    """
    option = lambda name, default: default if config.get(name) is None else config[name]  # noqa: E731
    sampling, beams = bool(option("do_sample", False)), option("num_beams", 1)
    _check_supported(config, sampling, beams)
    try:
        if beams != 1:
            return BeamSampler(beams, option("length_penalty", 1.0), option("early_stopping", False))
        penalty = option("repetition_penalty", 1.0)
        if not sampling:
            return Sampler(repetition_penalty=penalty, temperature=0.0)
        if option("temperature", 1.0) == 0:
            raise ValueError(
                "With do_sample the temperature must be above 0. Received: temperature=0. Set do_sample to false."
            )
        # top_p=1 keeps all tokens, but `Sampler` would sort them.
        top_p = None if option("top_p", 1.0) == 1 else config["top_p"]
        return Sampler(penalty, option("temperature", 1.0), option("top_k", 50) or None, top_p, config.get("min_p"))
    except ValueError as error:
        raise ValueError(
            f"{error} This was read from {FILE}, or config.json without it: change model.generation_config."
        ) from error


def _check_supported(config, sampling, beams):
    neutral = _UNSUPPORTED | (_UNSUPPORTED_IN_SAMPLING if sampling else {})
    if beams != 1:
        neutral = neutral | {"repetition_penalty": (1,), "do_sample": (False,)}
    wrong = {name: config[name] for name in neutral if config.get(name) is not None}
    wrong = {name: value for name, value in wrong.items() if value not in neutral[name]}
    if wrong:
        more = f" with num_beams={beams}" if beams != 1 else ""
        raise ValueError(
            f"generate follows {FILE}, except for unsupported options. Received: "
            f"{', '.join(f'{name}={value!r}' for name, value in wrong.items())}{more}. Pass sampler=, for example "
            "'greedy', which replaces all options of the file that choose tokens, or delete the options from "
            "model.generation_config."
        )


def _check_integer(name, value):
    if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise ValueError(
            f"{name} in {FILE}, or config.json without it, must be an integer. Received: {name}={value!r}. Change "
            "model.generation_config."
        )


def stop_token_ids(config):
    """Returns the list of ids that end a row. It excludes ids below 0, which are not tokens."""
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    for each in ids:
        _check_integer("eos_token_id", each)
    return [i for i in ids if i is not None and not (isinstance(i, int) and i < 0)]


def pad_token_id(config):
    """Returns the id that fills finished rows in transformers: pad_token_id, or else the first id that ends a row."""
    found = config.get("pad_token_id")
    _check_integer("pad_token_id", found)
    return next(iter(stop_token_ids(config)), None) if found is None else found


def length_limits(config):
    """Returns `(max_length, max_new_tokens)`. One of them is None: max_new_tokens takes precedence."""
    for name in ("max_length", "max_new_tokens"):
        _check_integer(name, config.get(name))
    if config.get("max_new_tokens") is not None:
        return None, config["max_new_tokens"]
    return (None, NEW_TOKENS) if config.get("max_length") is None else (config["max_length"], None)

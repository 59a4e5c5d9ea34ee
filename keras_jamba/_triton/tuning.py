"""How a kernel is cut where no rule says it: the fastest way, measured once for each device and class of shapes.

The rules are measured on Hopper GPUs, and there nothing else is asked. KERAS_JAMBA_TUNING=rules takes them everywhere,
=measure nowhere. What was measured is kept for later processes in tuning.json, in Keras' folder (~/.keras, KERAS_HOME).
"""

import functools
import importlib.metadata
import json
import logging
import math
import os
from pathlib import Path

from keras_jamba import _files

_logger = logging.getLogger("keras_jamba")
# Changes with what makes older measurements worthless.
_FORMAT = 1


def measures(gpu):
    """Whether to measure, or to take the rules.

    Raises:
        ValueError: if KERAS_JAMBA_TUNING is neither "rules" nor "measure".
    """
    wanted = os.environ.get("KERAS_JAMBA_TUNING")
    if wanted not in (None, "rules", "measure"):
        raise ValueError(
            f"KERAS_JAMBA_TUNING must be 'rules' or 'measure'. Received: {wanted!r}. Unset it, and rules are taken on "
            "the GPUs that they were measured on."
        )
    return gpu.clock is not None and (wanted == "measure" or wanted is None and not gpu.has_rules)


def chosen(gpu, kernel, kind, rule, others, specs, run):
    """`rule`, a named tuple of integers, or another that is faster on this device; to be asked where it `measures`.

    Args:
        gpu: a `Gpu`.
        kernel, kind: a name, and a tuple of numbers, strings and booleans: what the choice depends on.
        others: what else can be chosen.
        specs: `{name: (shape, dtype, value)}` of arrays that `run` takes, filled with a number or with those of a range
            again and again.
        run: `(gpu, choice, arrays)` launches the kernel once, and returns arrays.
    """
    key = json.dumps([gpu.device, importlib.metadata.version("triton"), kernel, *kind])
    known = _known()
    if not _is_choice(known.get(key), rule):
        found = _measured(gpu, key, dict.fromkeys([rule, *others]), specs, run)
        if found is None:
            return rule
        known[key] = list(found)
        _keep(key, known[key])
    return type(rule)(*known[key])


def _is_choice(entry, rule):
    return isinstance(entry, list) and len(entry) == len(rule) and all(type(number) is int for number in entry)


def _measured(gpu, key, choices, specs, run):
    """The fastest, the first unless another is clearly faster; None if nothing can be measured here and now."""
    _logger.info("%s: measuring %d ways to run it", key, len(choices))
    seconds = {}
    for choice in choices:
        seconds[choice] = gpu.clock(specs, lambda arrays, choice=choice: run(gpu, choice, arrays))
        if seconds[choice] is None:
            return None
    rule, best = next(iter(choices)), min(seconds, key=seconds.get)
    _logger.info("%s: %s of %s", key, best, {tuple(k): f"{1e3 * s:.3g} ms" for k, s in seconds.items()})
    if math.isinf(seconds[best]):
        return None
    return best if seconds[best] < 0.95 * seconds[rule] else rule


def power(size):
    """The least power of two that is not smaller: what a class of shapes has in common."""
    return 1 << max(0, math.ceil(size) - 1).bit_length()


def _file():
    home = os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")
    return Path(home) / "keras_jamba" / "tuning.json"


@functools.cache
def _known():
    return _read()


def _read():
    try:
        content = json.loads(_file().read_text(encoding="utf-8"))
        return dict(content["choices"]) if content["format"] == _FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _keep(key, choice):
    """In the file, with what other processes have measured meanwhile; where nothing can be written, in memory alone."""
    path = _file()
    text = json.dumps({"format": _FORMAT, "choices": _read() | {key: choice}}, indent=1)
    try:
        with _files.atomic_file(path) as staged:
            staged.write_text(text, encoding="utf-8")
    except OSError as error:
        _logger.debug("%s is not written: %s", path, error)

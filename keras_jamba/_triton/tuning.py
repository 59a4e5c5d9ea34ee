"""Autotuning of kernels: on devices without rules, measures the fastest tiling once per class of shapes.

The rules come from measurements on Hopper GPUs, where they apply without measuring. KERAS_JAMBA_TUNING=rules applies
them on all devices, KERAS_JAMBA_TUNING=measure on none. Results are stored for later processes in
`keras_jamba/tuning.json` in Keras' folder (KERAS_HOME, by default ~/.keras).
"""

import functools
import importlib.metadata
import json
import logging
import math
import os
from pathlib import Path

from keras_jamba import _checksums, _files

_logger = logging.getLogger("keras_jamba")
# Increases with every change that invalidates older measurements.
_FORMAT = 1


def measures(gpu):
    """Returns whether to measure instead of using the rules.

    Raises:
        ValueError: if KERAS_JAMBA_TUNING is neither "rules" nor "measure".
    """
    wanted = os.environ.get("KERAS_JAMBA_TUNING")
    if wanted not in (None, "rules", "measure"):
        raise ValueError(
            f"KERAS_JAMBA_TUNING must be 'rules' or 'measure'. Received: {wanted!r}. Unset it to use the rules on "
            "the GPUs they were measured on."
        )
    return gpu.clock is not None and (wanted == "measure" or wanted is None and not gpu.has_rules)


def chosen(gpu, kernel, kind, rule, others, specs, run):
    """Returns the fastest choice on this device, `rule` or one of `others`; call it only if `measures(gpu)`.

    Args:
        gpu: a `Gpu`.
        kernel: the name of the kernel.
        kind: a tuple of numbers, strings and booleans, the class of shapes that the choice depends on.
        rule: a named tuple of integers.
        others: the other choices, of the same type.
        specs: `{name: (shape, dtype, value)}` of the arrays for `run`. A number fills an array; a range fills it
            repeatedly.
        run: `(gpu, choice, arrays)`, which launches the kernel once and returns arrays.
    """
    key = json.dumps([gpu.device, importlib.metadata.version("triton"), kernel, *kind])
    known, choices = _known(), dict.fromkeys([rule, *others])
    if not _is_choice(known.get(key), choices):
        found = _measured(gpu, key, choices, specs, run)
        if found is None:
            return rule
        known[key] = list(found)
        _keep(key, known[key])
    return type(rule)(*known[key])


def _is_choice(entry, choices):
    """Returns whether an entry of the file is one of the choices; a damaged or older file may hold any other."""
    return isinstance(entry, list) and any(all(type(n) is int for n in entry) and tuple(entry) == c for c in choices)


def _measured(gpu, key, choices, specs, run):
    """Returns the fastest choice, or the first unless another is 5 % faster; None if measuring is impossible now."""
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
    """Returns the smallest power of two that is at least `size`; it identifies a class of shapes."""
    return 1 << max(0, math.ceil(size) - 1).bit_length()


def _file():
    home = os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")
    return Path(home) / "keras_jamba" / "tuning.json"


@functools.cache
def _known():
    choices, has_checksum = _read()
    if choices and not has_checksum:
        _logger.warning("%s was written without a checksum; the next measurement adds one.", _file())
    return choices


def _read():
    """Returns the choices of the file, and whether it has a checksum. An absent or damaged file has no choices."""
    try:
        content = _files.read_json(_file())
        good = content["format"] == _FORMAT and _checksums.matches(content, required=False)
        return dict(content["choices"]) if good else {}, _checksums.KEY in content
    except (OSError, ValueError, KeyError, TypeError):
        return {}, False


def _keep(key, choice):
    """Adds a choice to the file, next to those of other processes; an unwritable file is only logged."""
    path = _file()
    text = json.dumps(_checksums.sealed({"format": _FORMAT, "choices": _read()[0] | {key: choice}}), indent=1)
    try:
        with _files.atomic_file(path) as staged:
            staged.write_text(text, encoding="utf-8")
    except OSError as error:
        _logger.debug("%s is not written: %s", path, error)

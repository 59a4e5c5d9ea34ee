"""Selection of the fastest implementation that can run, with an error that lists every reason if none can."""

import logging

from keras import backend, ops

from keras_jamba import _backend, _native

_logger = logging.getLogger("keras_jamba")
_logged: set[tuple[str, str]] = set()
_noticed: list[str] = []


def choose(op, table, requested, call):
    """Returns the first implementation of `op` in an ordered table that can run.

    Args:
        op: name of the op, for messages.
        table: `{name: module}`, fastest first. Each module has `run(...)` and `why_not(call)`, which returns None
            or the reason why it cannot run.
        requested: the name of the implementation to use, or None for the first that can run.
        call: the shapes, dtype and platform of this call, which `why_not` reads.

    Returns:
        The module.

    Raises:
        ValueError: if `requested` is unknown or cannot run, or if no implementation can run.
    """
    if requested is not None and requested not in table:
        raise ValueError(
            f"The implementation of {op} must be one of {sorted(table)}. "
            f"Received: implementation={requested!r}. Pass one of these names, or None for the fastest."
        )
    reasons = {}
    for name in table if requested is None else [requested]:
        reasons[name] = table[name].why_not(call)
        if reasons[name] is None:
            if requested is None:
                _notice_missing_library(op, name, reasons)
            _log_once(op, name, {k: v for k, v in reasons.items() if v is not None})
            return table[name]
    listing = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
    raise ValueError(
        f"No implementation of {op} can run this call. Received: implementation={requested!r}. {listing}. "
        f"Other names on this platform: {sorted(set(table) - set(reasons))}. None selects the fastest that can run."
    )


def _notice_missing_library(op, name, reasons):
    """Warns once per process that the fastest implementation on a CPU lacks its C library."""
    reason = _native.why_not()
    if reason and reasons.get("native") == reason and not _noticed and _backend.tensors.can_log():
        _noticed.append(op)
        _logger.warning("%s runs as %r, which is several times slower on a CPU than 'native': %s.", op, name, reason)


def _log_once(op, name, refused):
    if (op, name) not in _logged and _backend.tensors.can_log():
        _logged.add((op, name))
        why = "".join(f"; not as {other!r}: {reason}" for other, reason in refused.items())
        _logger.info("%s runs as %r%s", op, name, why)


def in_short_or_single(x):
    """Returns `x` in a dtype that the kernels read: bfloat16, float16 or float32. None stays None."""
    if x is None or backend.standardize_dtype(x.dtype) in ("bfloat16", "float16", "float32"):
        return x
    return ops.cast(x, "float32")

"""The fastest implementation that can run, or an error that lists every reason why none can."""

import logging

from keras import backend, ops

from keras_jamba import _backend, _native

_logger = logging.getLogger("keras_jamba")
_logged, _noticed = set(), []


def choose(op, table, requested, call):
    """Picks an implementation of `op` from an ordered table.

    Args:
        op: name of the op, for messages.
        table: `{name: module}`, fastest first. Each module has `why_not(call)`, which returns None
            or the reason why it cannot run, and `run(...)`.
        requested: a name that must be taken, or None for the first that does not refuse.
        call: what `why_not` may look at: shapes, dtype and platform of this call.

    Returns:
        The module.

    Raises:
        ValueError: if `requested` is unknown or refuses, or all of them refuse.
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
        f"No implementation of {op} can run as asked. Received: implementation={requested!r}. {listing}. "
        f"The others here are {sorted(set(table) - set(reasons))}; None takes the fastest that can run."
    )


def _notice_missing_library(op, name, reasons):
    """Warns once per process that the C library is missing, which the fastest implementation on a CPU needs."""
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
    """`x` in a dtype that the native kernels read: bfloat16, float16 or float32. None stays None."""
    if x is None or backend.standardize_dtype(x.dtype) in ("bfloat16", "float16", "float32"):
        return x
    return ops.cast(x, "float32")

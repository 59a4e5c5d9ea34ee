"""Whether this thread traces a model for an export."""

import contextlib
import threading

_state = threading.local()


@contextlib.contextmanager
def exporting(for_other_runtime=False):
    before = exports(), exports_for_other_runtime()
    _state.exports, _state.for_other_runtime = True, for_other_runtime
    try:
        yield
    finally:
        _state.exports, _state.for_other_runtime = before


def exports():
    return getattr(_state, "exports", False)


def exports_for_other_runtime():
    return getattr(_state, "for_other_runtime", False)

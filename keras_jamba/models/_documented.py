"""Documentation of methods that pass their arguments on to Keras."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

_Method = TypeVar("_Method", bound=Callable[..., Any])


def documented_by(method: Callable[..., Any]) -> Callable[[_Method], _Method]:
    """Returns a decorator that copies the documentation and signature of a method of Keras.

    It is `functools.wraps`, except that type checkers still take the result for a method.
    """
    return cast(Callable[[_Method], _Method], functools.wraps(method))

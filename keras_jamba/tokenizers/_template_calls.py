"""Bounds of the methods, filters and tests that chat templates call."""

import functools
import types
from collections.abc import Iterator

from jinja2.exceptions import SecurityError

from keras_jamba.tokenizers._template_budget import (
    LimitError,
    budget,
    check_comparisons,
    check_integers,
    check_printf,
    checked,
    growth,
    measured,
    shallow,
)

# Bytes of a new object in a list.
_ITEM = 64
# Bytes of the result per byte of the argument: %C3%A9 in `urlencode`, one word per two characters in `title`.
_GROWTH = 32
# Methods whose result is no longer than about their arguments.
_STR = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper lower partition removeprefix removesuffix startswith swapcase title "
    "upper"
).split()
_SEARCHES = ("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip")
_WIDTHS = ("center", "ljust", "rjust", "zfill")
_METHODS = {
    str: {*_STR, *_SEARCHES, *_WIDTHS, "expandtabs", "join", "replace", "split", "splitlines"},
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    range: {"count", "index"},
    float: {"is_integer"},
}
# Filters that hand values on, one by one.
_LAZY = {
    *("attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random"),
    *("reject", "rejectattr", "reverse", "select", "selectattr"),
}
# Filters whose result may be as long as the product of their arguments.
_PRODUCTS = {"batch", "center", "indent", "slice"}
_LONGEST_NUMBER, _LARGEST_PRECISION = 5000, 100


def counted(x):
    """Counts a new value, and returns it."""
    budget().spend(shallow(x))
    return x


def count_items(function, result):
    """Counts the words in the result of a method of strings."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, str) and isinstance(result, list):
        budget().spend(_ITEM * len(result) + shallow(owner))


def joins(function):
    return getattr(function, "__name__", None) == "join" and isinstance(getattr(function, "__self__", None), str)


def check_join(separator, items):
    """Raises LimitError unless the joined items fit the budget."""
    budget().need((measured(items)[0] + 4 * len(separator) * len(items)) * growth(separator))


def check_call(function, args, kwargs):
    """Raises LimitError or SecurityError unless a call fits the budget.

    Functions of Jinja, macros and the functions of this package need no bound beyond their arguments'.
    """
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", None)
    if not isinstance(owner, str) and not isinstance(function, types.BuiltinMethodType):
        return
    kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
    if kind is None or name not in _METHODS[kind]:
        raise SecurityError(f"the method {name} of {type(owner).__name__}, which chat templates may not call")
    if kind is str:
        _check_text_method(owner, name, [*args, *kwargs.values()])
    else:
        budget().need(shallow(owner))


def _check_text_method(text, name, args):
    size = shallow(text)
    numbers = [x for x in args if isinstance(x, int)]
    if name in _SEARCHES:
        check_comparisons(text, args)
    if name in _WIDTHS:
        size += 4 * max(numbers, default=0)
    elif name == "expandtabs":
        size += 4 * text.count("\t") * max(numbers, default=8)
    elif name == "replace":
        size += _replaced(text, args)
    elif name in ("split", "rsplit") and args and isinstance(args[0], str) and args[0]:
        size += _ITEM * (text.count(args[0]) + 1)
    elif name in ("split", "rsplit", "splitlines"):
        size *= _GROWTH
    budget().need(3 * size * growth(text))


def _replaced(text, args):
    """Returns the bytes that `text.replace(*args)` adds at most."""
    if len(args) < 2 or not isinstance(args[0], str) or not isinstance(args[1], str):
        return 0
    return text.count(args[0]) * shallow(args[1])


def limited_filter(name, function):
    """Returns a filter of Jinja that first checks that its result fits the budget."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args, **kwargs):
        before, value, rest = args[:skipped], args[skipped], args[skipped + 1 :]
        extra = [checked(x) for x in (*rest, *kwargs.values())]
        budget().check()
        if name not in _LAZY:
            value = list(value) if isinstance(value, Iterator) else value
            _check_filter(name, value, extra)
        elif name == "list" and isinstance(value, str):
            budget().spend(_ITEM * len(value))
        result = function(*before, value, *rest, **kwargs)
        # An iterator stays one: it is true, and used once.
        return iter(_listed(result)) if isinstance(result, Iterator) else counted(result)

    return run


def _listed(items):
    found, left = [], budget()
    for item in items:
        left.spend(_ITEM + (shallow(item) if isinstance(item, (list, tuple)) else 0))
        found.append(item)
    return found


def _check_filter(name, value, extra):
    size, depth = measured(value)
    numbers = [x for x in extra if isinstance(x, int) and not isinstance(x, bool)]
    budget().need(size)
    check_integers(value, *numbers)
    if name in _PRODUCTS:
        size *= 1 + sum(abs(x) for x in numbers) + sum(len(x) for x in extra if isinstance(x, str))
    elif name == "replace":
        size += _replaced(str(value), extra)
    elif name == "join":
        separator = next((x for x in extra if isinstance(x, str)), "")
        check_join(separator, value if hasattr(value, "__len__") else [])
    elif name == "format":
        check_printf(value if isinstance(value, str) else str(value), extra)
    elif name == "trim":
        check_comparisons(str(value), extra)
    elif name == "round" and any(abs(x) > _LARGEST_PRECISION for x in numbers):
        raise LimitError(f"a template that rounds to more than {_LARGEST_PRECISION} digits")
    elif name == "int" and isinstance(value, str) and len(value) > _LONGEST_NUMBER:
        raise LimitError(f"a template with a number of more than {_LONGEST_NUMBER} digits")
    elif name == "sum" and any(isinstance(x, (list, tuple)) for x in extra):
        raise LimitError("a template that adds lists with the filter sum")
    budget().need(size if name in _PRODUCTS else _GROWTH * size if isinstance(value, str) else 3 * size)


def check_json(value, indent, separators):
    """Raises LimitError unless the JSON text of a value fits the budget."""
    size, depth = measured(value)
    widths = [x if isinstance(x, int) else len(x) for x in (indent or 0, *(separators or ()))]
    budget().need(size * (6 + sum(widths) * (depth + 1)))


def limited_test(function):
    """Returns a test of Jinja that first checks that its arguments can be compared within the budget."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        for x in (*args, *kwargs.values()):
            checked(x)
        return function(*args, **kwargs)

    return run

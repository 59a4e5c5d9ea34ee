"""The time and memory that one chat template may use."""

import contextlib
import contextvars
import re
import sys
import time

# Seconds of CPU time, which a busy machine does not shorten. A usual template renders within milliseconds.
SECONDS = 4
# Bytes of all values that a template creates, and further bytes per byte of the conversation.
BYTES, BYTES_PER_BYTE = 48 * 2**20, 32
# Integers have no more bits.
BITS = 16384
# Operations of quadratic time, such as `strip` with many characters, compare at most this number of characters.
_COMPARISONS = 10**9
# printf and str.format: longest format, and digits of a width or precision.
_LONGEST_FORMAT = 10_000
# What follows a percent sign and its key: flags, width, precision, length and conversion.
_SPECIFIER = re.compile(r"[#0\- +]*(\*|[0-9]*)(?:\.(\*|[0-9]*))?[hlL]?.?", re.DOTALL)
_LONG_NUMBER = re.compile(r"\d{4,}")

_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


class LimitError(Exception):
    """A template that needs too much time or memory. Its text describes the limit."""


class Budget:
    """What is left for one template.

    Args:
        given: bytes of the conversation.
    """

    def __init__(self, given=0):
        self.total = BYTES + BYTES_PER_BYTE * given
        self.left, self._deadline = self.total, time.thread_time() + SECONDS
        # Never later than the deadline, and read in a seventh of the time.
        self._earliest = time.monotonic() + SECONDS

    def check(self):
        """Raises LimitError if the time is over."""
        if time.monotonic() > self._earliest and time.thread_time() > self._deadline:
            raise LimitError(f"a template that takes more than {SECONDS} seconds of CPU time")

    def need(self, size):
        """Raises LimitError unless `size` bytes are left."""
        self.check()
        if size > self.left:
            raise LimitError(f"a template whose values, output and loops take more than {self.total // 2**20} MiB")

    def spend(self, size):
        """Subtracts `size` bytes."""
        self.need(size)
        self.left -= size


_current: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget of a chat template")


@contextlib.contextmanager
def limited(given=0):
    """Gives the templates that are compiled or rendered inside a budget."""
    token = _current.set(Budget(given))
    try:
        yield
    finally:
        _current.reset(token)


def budget():
    """Returns the budget of this thread."""
    return _current.get()


def measured(x):
    """Returns the bytes of the text of a value, about, and the depth of its containers.

    A container that occurs several times counts several times, as in its text.
    """
    if isinstance(x, str):
        return sys.getsizeof(x), 0
    if isinstance(x, int):
        return 32 + x.bit_length() // 3, 0
    return _measured_container(x, {}) if isinstance(x, (list, tuple, dict, *_VIEWS)) else (64, 0)


def _measured_container(x, known):
    if id(x) not in known:
        pairs = x if isinstance(x, dict) else x.mapping if isinstance(x, _VIEWS) else None
        size, depth = 64, 0
        for items in [x] if pairs is None else [pairs.keys(), pairs.values()]:
            for item in items:
                container = isinstance(item, (list, tuple, dict, *_VIEWS))
                item_size, item_depth = _measured_container(item, known) if container else measured(item)
                size, depth = size + 8 + item_size, max(depth, item_depth)
        known[id(x)] = size, depth + 1
    return known[id(x)]


def growth(text):
    """Returns the largest length of one character of another text that is added to `text`, which may escape it."""
    return 6 if hasattr(text, "__html__") else 1


def shallow(x):
    """Returns the bytes of a new value without its items."""
    return sys.getsizeof(x) if isinstance(x, (str, int, list, tuple, dict, set, frozenset)) else 0


def repeated(x):
    """Returns the bytes that each repetition of a text, list or tuple takes."""
    return 8 * len(x) if isinstance(x, (list, tuple)) else min(4 * len(x), sys.getsizeof(x))


def checked(x):
    """Returns a value that can be compared, hashed and written within the budget. Other values raise LimitError."""
    if isinstance(x, (list, tuple, dict, *_VIEWS)):
        budget().need(measured(x)[0])
    else:
        budget().check()
    return x


def check_integers(*values):
    """Raises LimitError for an integer that is too large for arithmetic."""
    if any(isinstance(x, int) and x.bit_length() > BITS for x in values):
        raise LimitError(f"a template with an integer of more than {BITS} bits")


def check_comparisons(text, others):
    """Raises LimitError if a search of quadratic time could take too long."""
    if len(text) * max((len(x) for x in others if isinstance(x, str)), default=0) > _COMPARISONS:
        raise LimitError("a template that searches a long text for a long text from its end")


def _printf_sizes(form):
    """Yields the widths and precisions of a printf format, in linear time."""
    place = form.find("%") + 1
    while place:
        found = _SPECIFIER.match(form, _after_key(form, place))
        yield from (size for size in found.groups() if size)
        place = form.find("%", found.end()) + 1


def _after_key(form, place):
    """Returns the place after the key in parentheses at `place`, which may contain parentheses."""
    depth = 0
    for i in range(place, len(form)):
        depth += {"(": 1, ")": -1}.get(form[i], 0)
        if depth < 1:
            return i + (i > place)
    return len(form)


def check_printf(form, values):
    """Raises LimitError unless `form % values` fits the budget."""
    if len(form) > _LONGEST_FORMAT or any(size == "*" or len(size) > 3 for size in _printf_sizes(form)):
        raise LimitError("a template with a format that is too long, or too wide")
    budget().need(sys.getsizeof(form) + form.count("%") * (measured(values)[0] + 1000) * growth(form))


def check_format(form, args, kwargs, parts):
    """Raises LimitError unless `form.format(*args, **kwargs)` fits the budget. `parts` are the parsed `form`."""
    if len(form) > _LONGEST_FORMAT:
        raise LimitError("a template with a format that is too long")
    fields = 0
    for _, field, spec, _ in parts:
        fields += field is not None
        if spec and ("{" in spec or _LONG_NUMBER.search(spec)):
            raise LimitError("a template with a format that is too wide, or whose width is computed")
    size = measured(list(args))[0] + measured(kwargs)[0] + 1000
    budget().need(sys.getsizeof(form) + fields * size * growth(form))

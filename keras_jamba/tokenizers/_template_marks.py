"""The places of an assistant's answers, the tag `{% generation %}`, in the text of a chat template."""

import contextlib
import contextvars

from keras_jamba.tokenizers._template_budget import budget

# Bytes that one place takes.
_PLACE = 128


class MarkedText(str):
    """A text that knows the places of answers. `joined` keeps them. All other operations return plain texts.

    Attributes:
        _places: a list of `(begin, end, key)` in characters, one per answer. Sandboxed templates cannot read it.
    """

    _places: list

    def __str__(self):
        return self  # Jinja calls `str` on all output.


# Keys of the answers that are in no place of a larger text yet.
_answers: contextvars.ContextVar[set] = contextvars.ContextVar("answers in a chat template")


@contextlib.contextmanager
def recorded():
    """Gives the template that is rendered inside an empty set, which receives the keys of its answers."""
    token = _answers.set(set())
    try:
        yield _answers.get()
    finally:
        _answers.reset(token)


def marked(text):
    """Returns `text` as one answer. Answers inside it become a part of it."""
    key, answers = object(), _answers.get()
    answers.difference_update(inner for _, _, inner in places(text))
    answers.add(key)
    return _with_places(text, [(0, len(text), key)])


def places(text):
    """Returns `[(begin, end, key)]` of the answers in a text, in their order."""
    return text._places if isinstance(text, MarkedText) else []


def joined(parts):
    """Returns the texts in the list `parts` as one text, with the places of their answers."""
    text = "".join(parts)
    if not any(isinstance(part, MarkedText) for part in parts):
        return text
    found, at = [], 0
    for part in parts:
        found += [(begin + at, end + at, key) for begin, end, key in places(part)]
        at += len(part)
    return _with_places(text, found)


def plain(text):
    """Returns a text without places."""
    return str.__str__(text)


def _with_places(text, found):
    budget().spend(_PLACE * len(found))
    text = MarkedText(text)
    text._places = found
    return text

"""Operations on each device's part of their tensors."""

from keras_jamba import _backend


def on_parts(function, tensors, letters, results):
    """What `function(**tensors)` returns, each device of the active distribution working on its rows and channels.

    Args:
        function: of tensors by name, any of which may be None, to a tuple of tensors; no row and no channel may
            depend on another.
        letters: `{name: its axes}`, "b" for rows and "e" for channels, others as they like.
        results: the axes of what is returned.
    """
    parts = _backend.parts()
    if parts is None:
        return function(**tensors)
    present = {name: x for name, x in tensors.items() if x is not None}
    absent = dict.fromkeys(set(tensors) - set(present))
    sizes = {letter: size for name, x in present.items() for letter, size in zip(letters[name], x.shape, strict=True)}
    axes = {"b": parts.batch, "e": parts.model}
    split = {
        letter: axis for letter, axis in axes.items() if letter in sizes and divides(parts.count(axis), sizes[letter])
    }
    of = lambda letters: tuple(split.get(letter) for letter in letters)  # noqa: E731
    given = {name: of(letters[name]) for name in present}
    return _backend.on_parts(
        lambda found: function(**found, **absent), present, given, [of(letters) for letters in results]
    )


def by_tokens(x):
    """`x (b, t, ...)`, the tokens of a row split among devices where the distribution wants that."""
    return _split(x, axis=1)


def by_heads(x):
    """`x (b, t, h, ...)`, the heads split among devices where the distribution splits tokens elsewhere."""
    return _split(x, axis=2)


def _split(x, axis):
    parts = _backend.parts()
    if parts is None or not parts.sequence or not divides(parts.count(parts.model), x.shape[axis]):
        return x
    axes = [None] * len(x.shape)
    axes[0] = parts.batch if divides(parts.count(parts.batch), x.shape[0]) else None
    axes[axis] = parts.model
    return _backend.constrained(x, axes)


def divides(count, size):
    """Whether a size is known, and a multiple of `count`."""
    return isinstance(size, int) and size % count == 0

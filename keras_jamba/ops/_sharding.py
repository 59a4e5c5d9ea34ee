"""Operations on each device's part of their tensors."""

import math

from keras import ops

from keras_jamba import _backend


def shard_map(function, tensors, letters, results):
    """What `function(**tensors)` returns, each device of the active distribution working on its rows and channels.

    Args:
        function: of tensors by name, any of which may be None, to a tuple of tensors; no row and no channel may
            depend on another.
        letters: `{name: its axes}`, "b" for rows and "e" for channels, others as they like.
        results: the axes of what is returned.
    """
    parts = _backend.sharding.active_mesh()
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
    return _backend.sharding.shard_map(
        lambda found: function(**found, **absent), present, given, [of(letters) for letters in results]
    )


def between_blocks(x):
    """`x (b, t, d)`, all of a row's tokens with all devices that share it, or each token with one of them."""
    parts = _backend.sharding.active_mesh()
    if parts is None:
        return x
    by_tokens = parts.sequence and divides(parts.count(parts.model), x.shape[1])
    return _split(x, parts, axis=1 if by_tokens else None)


def by_tokens(x):
    """`x (b, t, ...)`, the tokens of a row split among devices where the distribution wants that."""
    parts = _backend.sharding.active_mesh()
    return _split(x, parts, axis=1) if parts and parts.sequence else x


def by_heads(x):
    """`x (b, t, h, ...)`, the heads split among devices where the distribution splits tokens elsewhere."""
    parts = _backend.sharding.active_mesh()
    return _split(x, parts, axis=2) if parts and parts.sequence else x


def by_channels(x):
    """`x (b, t, e)`, the channels split among devices where the distribution does not split tokens."""
    parts = _backend.sharding.active_mesh()
    return x if parts is None or parts.sequence else _split(x, parts, axis=2)


def filled(shape, value, dtype, split=None):
    """A tensor of one number that no device ever has whole: its rows are split, and its axis `split`."""
    parts = _backend.sharding.active_mesh()
    if parts is None:
        return ops.full(shape, value, dtype)
    return _backend.sharding.sharded_full(shape, value, dtype, _axes(shape, split, parts))


def before_heads(x, count):
    """`x (b, t, h * c)`, with no head in parts of it where the devices that share them are not as many or fewer."""
    parts = _backend.sharding.active_mesh()
    if parts is None or parts.sequence or divides(parts.count(parts.model), count):
        return x
    return _split(x, parts, axis=None)


def with_their_queries(query, key, value):
    """`(b, t, h, c)`, `(b, s, g, c)` and `(b, s, g, c)` of attention, heads split among the devices where they can be.

    Where key-value heads are fewer, each device is to have those of its queries: they are repeated.
    """
    parts = _backend.sharding.active_mesh()
    if parts is None or not divides(parts.count(parts.model), query.shape[2]):
        return query, key, value
    groups = key.shape[2]
    repeats = math.lcm(groups, parts.count(parts.model)) // groups
    if query.shape[2] % (groups * repeats):
        return query, key, value
    if repeats > 1:
        key, value = (ops.repeat(_split(x, parts, axis=None), repeats, axis=2) for x in (key, value))
    return tuple(_split(x, parts, axis=2) for x in (query, key, value))


def _split(x, parts, axis):
    axes = _axes(x.shape, axis, parts)
    return x if axis is not None and axes[axis] is None else _backend.sharding.with_sharding_constraint(x, axes)


def _axes(shape, split, parts):
    """Of each axis that of the mesh that divides it: the first one of rows, that of the model of `split`."""
    wanted = {split: parts.model, 0: parts.batch}
    return [
        wanted[i] if i in wanted and divides(parts.count(wanted[i]), size) else None for i, size in enumerate(shape)
    ]


def divides(count, size):
    """Whether a size is known, and a multiple of `count`."""
    return isinstance(size, int) and size % count == 0


def check_parts(d_model, always=None, by_channels=None):
    """Checks the sizes, by name, that the active distribution splits in a layer's variables.

    Args:
        d_model: is split among the devices of the first axis where these share matrices.
        always: sizes that are split among the devices of the second axis.
        by_channels: sizes that are split among these unless tokens are.

    Raises:
        ValueError: where one is no multiple of the devices that would share it.
    """
    parts = _backend.sharding.active_mesh()
    if parts is None:
        return
    sizes = (always or {}) | ((by_channels or {}) if parts.layouts_at_use or not parts.sequence else {})
    needed = [(name, size, parts.model) for name, size in sizes.items()]
    for name, size, axis in needed + ([("d_model", d_model, parts.batch)] if parts.layouts_at_use else []):
        if not divides(parts.count(axis), size):
            raise ValueError(
                f"{name} must be a multiple of the number of devices that share it. Received: {name}={size}, and "
                f"{parts.count(axis)} devices on the axis {axis!r} of the mesh. Choose another mesh, or another {name}."
            )

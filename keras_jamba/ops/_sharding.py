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
    mesh = _backend.sharding.active_mesh()
    if mesh is None:
        return function(**tensors)
    present = {name: x for name, x in tensors.items() if x is not None}
    absent = dict.fromkeys(set(tensors) - set(present))
    sizes = {letter: size for name, x in present.items() for letter, size in zip(letters[name], x.shape, strict=True)}
    axes = {"b": mesh.batch, "e": mesh.model}
    split = {
        letter: axis for letter, axis in axes.items() if letter in sizes and divides(mesh.count(axis), sizes[letter])
    }
    of = lambda letters: tuple(split.get(letter) for letter in letters)  # noqa: E731
    given = {name: of(letters[name]) for name in present}
    return _backend.sharding.shard_map(
        lambda found: function(**found, **absent), present, given, [of(letters) for letters in results]
    )


def between_blocks(x):
    """`x (b, t, d)`, all of a row's tokens with all devices that share it, or each token with one of them."""
    mesh = _backend.sharding.active_mesh()
    if mesh is None:
        return x
    by_tokens = mesh.sequence and divides(mesh.count(mesh.model), x.shape[1])
    return _split(x, mesh, axis=1 if by_tokens else None)


def by_tokens(x):
    """`x (b, t, ...)`, the tokens of a row split among devices where the distribution wants that."""
    mesh = _backend.sharding.active_mesh()
    return _split(x, mesh, axis=1) if mesh and mesh.sequence else x


def by_heads(x):
    """`x (b, t, h, ...)`, the heads split among devices where the distribution splits tokens elsewhere."""
    mesh = _backend.sharding.active_mesh()
    return _split(x, mesh, axis=2) if mesh and mesh.sequence else x


def by_channels(x):
    """`x (b, t, e)`, the channels split among devices where the distribution does not split tokens."""
    mesh = _backend.sharding.active_mesh()
    return x if mesh is None or mesh.sequence else _split(x, mesh, axis=2)


def filled(shape, value, dtype, split=None):
    """A tensor of one number that no device ever has whole: its rows are split, and its axis `split`."""
    mesh = _backend.sharding.active_mesh()
    if mesh is None:
        return ops.full(shape, value, dtype)
    return _backend.sharding.sharded_full(shape, value, dtype, _axes(shape, split, mesh))


def before_heads(x, count):
    """`x (b, t, h * c)`, with no head in parts of it where the devices that share them are not as many or fewer."""
    mesh = _backend.sharding.active_mesh()
    if mesh is None or mesh.sequence or divides(mesh.count(mesh.model), count):
        return x
    return _split(x, mesh, axis=None)


def with_their_queries(query, key, value):
    """`(b, t, h, c)`, `(b, s, g, c)` and `(b, s, g, c)` of attention, heads split among the devices where they can be.

    Where key-value heads are fewer, each device is to have those of its queries: they are repeated.
    """
    mesh = _backend.sharding.active_mesh()
    if mesh is None or not divides(mesh.count(mesh.model), query.shape[2]):
        return query, key, value
    groups = key.shape[2]
    repeats = math.lcm(groups, mesh.count(mesh.model)) // groups
    if query.shape[2] % (groups * repeats):
        return query, key, value
    if repeats > 1:
        key, value = (ops.repeat(_split(x, mesh, axis=None), repeats, axis=2) for x in (key, value))
    return tuple(_split(x, mesh, axis=2) for x in (query, key, value))


def _split(x, mesh, axis):
    axes = _axes(x.shape, axis, mesh)
    return x if axis is not None and axes[axis] is None else _backend.sharding.with_sharding_constraint(x, axes)


def _axes(shape, split, mesh):
    """Of each axis that of the mesh that divides it: the first one of rows, that of the model of `split`."""
    wanted = {split: mesh.model, 0: mesh.batch}
    return [wanted[i] if i in wanted and divides(mesh.count(wanted[i]), size) else None for i, size in enumerate(shape)]


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
    mesh = _backend.sharding.active_mesh()
    if mesh is None:
        return
    sizes = (always or {}) | ((by_channels or {}) if mesh.layouts_at_use or not mesh.sequence else {})
    needed = [(name, size, mesh.model) for name, size in sizes.items()]
    for name, size, axis in needed + ([("d_model", d_model, mesh.batch)] if mesh.layouts_at_use else []):
        if not divides(mesh.count(axis), size):
            raise ValueError(
                f"{name} must be a multiple of the number of devices that share it. Received: {name}={size}, and "
                f"{mesh.count(axis)} devices on the axis {axis!r} of the mesh. Choose another mesh, or another {name}."
            )

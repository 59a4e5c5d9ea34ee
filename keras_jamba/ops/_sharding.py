"""Operations on the local shards of tensors, and constraints on how the active mesh shards them."""

import math

from keras import ops

from keras_jamba import _backend


def shard_map(function, tensors, letters, results):
    """Computes `function(**tensors)`, with each device of the active mesh working on its own rows and channels.

    Args:
        function: maps tensors by name, any of which may be None, to a tuple of tensors. Rows and channels must be
            independent of each other.
        tensors: `{name: tensor or None}`, the arguments of `function`.
        letters: `{name: one letter per axis}`: "b" marks rows, "e" channels, "h" and "g" heads; other letters are not
            sharded.
        results: the axes of the outputs, in the same letters.

    Returns:
        The tuple that `function` returns.
    """
    mesh = _backend.sharding.active_mesh()
    if mesh is None:
        return function(**tensors)
    present = {name: x for name, x in tensors.items() if x is not None}
    absent = dict.fromkeys(set(tensors) - set(present))
    sizes = {letter: size for name, x in present.items() for letter, size in zip(letters[name], x.shape, strict=True)}
    axes = {"b": mesh.batch} | dict.fromkeys("ehg", mesh.model)
    split = {
        letter: axis for letter, axis in axes.items() if letter in sizes and divides(mesh.count(axis), sizes[letter])
    }
    of = lambda letters: tuple(split.get(letter) for letter in letters)  # noqa: E731
    given = {name: of(letters[name]) for name in present}
    return _backend.sharding.shard_map(
        lambda found: function(**found, **absent), present, given, [of(letters) for letters in results]
    )


def between_blocks(x):
    """Returns `x (b, t, d)` with its tokens sharded over the model axis, if the distribution shards sequences.

    Otherwise every device of the model axis holds all tokens of its rows.
    """
    mesh = _backend.sharding.active_mesh()
    if mesh is None:
        return x
    by_tokens = mesh.sequence and divides(mesh.count(mesh.model), x.shape[1])
    return _split(x, mesh, axis=1 if by_tokens else None)


def by_tokens(x):
    """Returns `x (b, t, ...)` with its tokens sharded over the model axis, if the distribution shards sequences."""
    mesh = _backend.sharding.active_mesh()
    return _split(x, mesh, axis=1) if mesh and mesh.sequence else x


def by_heads(x):
    """Returns `x (b, t, h, ...)` with its heads sharded over the model axis, if the distribution shards sequences."""
    mesh = _backend.sharding.active_mesh()
    return _split(x, mesh, axis=2) if mesh and mesh.sequence else x


def by_channels(x):
    """Returns `x (b, t, e)` with its channels sharded over the model axis, unless the distribution shards sequences."""
    mesh = _backend.sharding.active_mesh()
    return x if mesh is None or mesh.sequence else _split(x, mesh, axis=2)


def sharded_full(shape, value, dtype, split=None):
    """Returns a constant tensor that is created in shards: over its rows, and over its axis `split`."""
    mesh = _backend.sharding.active_mesh()
    if mesh is None:
        return ops.full(shape, value, dtype)
    return _backend.sharding.sharded_full(shape, value, dtype, _axes(shape, split, mesh))


def before_heads(x, count):
    """Returns `x (b, t, h * c)`, unsharded in its last axis if the model axis does not divide the `count` heads.

    No head is then split between devices.
    """
    mesh = _backend.sharding.active_mesh()
    if mesh is None or mesh.sequence or divides(mesh.count(mesh.model), count):
        return x
    return _split(x, mesh, axis=None)


def with_their_queries(query, key, value):
    """Returns query `(b, t, h, c)`, key and value `(b, s, g, c)` with heads sharded over the model axis where possible.

    Key-value heads are repeated if they are too few to shard: each device then holds those of its query heads.
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
    """Returns the mesh axis of each tensor axis, or None: batch for rows, model for `split`, where they divide."""
    wanted = {split: mesh.model, 0: mesh.batch}
    return [wanted[i] if i in wanted and divides(mesh.count(wanted[i]), size) else None for i, size in enumerate(shape)]


def divides(count, size):
    """Returns whether `size` is static and a multiple of `count`."""
    return isinstance(size, int) and size % count == 0


def check_divisible(d_model, always=None, by_channels=None):
    """Checks the sizes that the active mesh shards in a layer's variables.

    Args:
        d_model: the batch axis shards this size if its devices share matrices.
        always: `{name: size}` that the model axis always shards.
        by_channels: `{name: size}` that the model axis shards unless it shards tokens.

    Raises:
        ValueError: if a size is not a multiple of the number of devices that share it.
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

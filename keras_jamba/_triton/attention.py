"""Launches of the attention kernels: block sizes, grids and outputs."""

from typing import NamedTuple

from keras_jamba._triton.tuning import power

WIDEST = 256  # the largest head width


class Tile(NamedTuple):
    """Queries and keys per block, and warps per program."""

    rows: int
    columns: int
    warps: int


class Options(NamedTuple):
    """Attributes: `causal`; `window` in tokens, 0 for none; `sinks`, whether there are any; `isolate`, see `Damage`."""

    causal: bool
    window: int
    sinks: bool
    isolate: bool


class Given(NamedTuple):
    """Inputs of the kernels.

    Attributes:
        query: `(b, t, h, c)`.
        key, value: `(b, s, g, c)`.
        positions, documents: `(b, t)` int32, of the queries.
        key_positions, key_documents, sinks: `(b, s)` int32. `sinks` is any array without sinks.
    """

    query: object
    key: object
    value: object
    positions: object
    documents: object
    key_positions: object
    key_documents: object
    sinks: object


class Lists(NamedTuple):
    """The blocks that each block of queries, or of keys, has to read.

    Attributes:
        places: `(b, blocks, n)` int32, the blocks to read first.
        counts: `(b, blocks)` int32, their number.
    """

    places: object
    counts: object


class Damage(NamedTuple):
    """Damaged tokens. With `Options.isolate`, only the tokens that see them become NaN; else the kernels read nothing.

    Attributes:
        queries: `(b, t)` float32, above 0 for damaged queries.
        keys: `(b, s)` float32: 1 for a damaged key, 2 for a damaged value, 3 for both, else 0.
    """

    queries: object
    keys: object


def tile(width, dtype):
    """Returns the `Tile` for heads of this width."""
    if dtype == "float32" or width > 128:
        return Tile(32, 32, 4)
    return Tile(64, 64, 4)


def damage(gpu, x, limit):
    """Returns `(b, t)` float32: 1 for tokens of `x (b, t, h, c)` with NaN or a magnitude from `limit` on, else 0."""
    b, t, h, c = x.shape
    constants = dict(tokens=b * t, limit=limit, LENGTH=h * c, ROWS=4, BLOCK=min(1024, power(h * c)))
    grid = (_count(b * t, 4),)
    (found,) = gpu.launch(
        _kernel("token_damage"), grid, (x,), [((b, t), "float32")], constants, num_warps=4, num_stages=1
    )
    return found


def forward(gpu, given, lists, damaged, options):
    """Computes attention.

    Args:
        gpu: a `Gpu`.
        given: `Given`.
        lists: `Lists`, the blocks of keys for each block of queries.
        damaged: `Damage`.
        options: `Options`.

    Returns:
        `(outputs, logs, marks)`: `(b, t, h, c)` in the dtype of the query; the binary logarithms of the sums of the
        weights, `(b, h, t)` float32; and `(b, t)` float32, above 0 for queries that are damaged or see damage. Without
        `isolate`, `marks` are not written.
    """
    b, t, h, _ = given.query.shape
    outputs = [(tuple(given.query.shape), given.query.dtype), ((b, h, t), "float32"), ((b, t), "float32")]
    grid = (b * h, _count(t, _tile_of(given).rows))
    return _launched(gpu, "attention_forward", grid, (*given, *lists, *damaged), outputs, options)


def gradients(gpu, given, lists, key_lists, damaged, outputs, logs, grad, options):
    """Computes the gradients of query, key and value.

    Args:
        gpu, given, lists, options: as in `forward`.
        key_lists: `Lists`, the blocks of queries for each block of keys.
        damaged: `Damage`; its queries are the `marks` of `forward`, and also mark a damaged `grad`.
        outputs, logs: from `forward`.
        grad: `(b, t, h, c)`, the gradient of the outputs.

    Returns:
        `(b, t, h, c)`, and two of `(b, s, g * p, c)`, with p partial sums per key-value head.
    """
    (b, t, h, _), (_, s, g, c) = given.query.shape, given.key.shape
    size = _tile_of(given)
    like_query = (tuple(given.query.shape), given.query.dtype)
    grad_query, dots = _launched(
        gpu,
        "attention_query_gradient",
        (b * h, _count(t, size.rows)),
        (*given, *lists, *damaged, outputs, logs, grad),
        [like_query, ((b, h, t), "float32")],
        options,
    )
    parts = _parts(h // g, b * g * _count(s, size.columns), gpu.multiprocessors)
    like_key = ((b, s, g * parts, c), given.key.dtype if parts == 1 else "float32")
    grad_key, grad_value = _launched(
        gpu,
        "attention_key_gradient",
        (b * g * parts, _count(s, size.columns)),
        (*given, *key_lists, *damaged, logs, grad, dots),
        [like_key, like_key],
        options,
        PARTS=parts,
    )
    return grad_query, grad_key, grad_value


def _parts(repeats, programs, multiprocessors):
    """Returns into how many parts to split the query heads of a key-value head: few programs leave the GPU idle."""
    divisors = (n for n in range(1, repeats + 1) if repeats % n == 0)
    return next((n for n in divisors if n * programs >= 4 * multiprocessors), repeats)


def _tile_of(given):
    return tile(given.query.shape[3], str(given.query.dtype).removeprefix("torch."))


def _launched(gpu, name, grid, inputs, outputs, options, **more):
    query, key, places = inputs[0], inputs[1], inputs[8]
    (_, t, heads, width), (_, s, groups, _) = query.shape, key.shape
    size = tile(width, str(query.dtype).removeprefix("torch."))
    constants = dict(queries=t, keys=s, blocks=places.shape[1], listed=places.shape[2], scale=width**-0.5)
    constants |= dict(HEADS=heads, GROUPS=groups, WIDTH=width, BLOCK_WIDTH=max(16, power(width)))
    constants |= dict(ROWS=size.rows, COLUMNS=size.columns, CAUSAL=options.causal, WINDOW=options.window)
    constants |= dict(SINKS=options.sinks, ISOLATE=options.isolate)
    constants |= dict(PRECISION="ieee" if "float32" in str(query.dtype) else "tf32") | more
    return gpu.launch(_kernel(name), grid, inputs, outputs, constants, num_warps=size.warps, num_stages=2)


def _kernel(name):
    # Imported lazily: Triton may be missing.
    from keras_jamba._triton import attention_kernels

    return getattr(attention_kernels, name)


def _count(size, block):
    return -(-size // block)

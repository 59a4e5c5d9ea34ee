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
    """Attributes: `causal`; `window` in tokens, 0 for none; `sinks`, whether there are any."""

    causal: bool
    window: int
    sinks: bool


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


def tiles(width, dtype):
    """Returns the tiles of the forward and of the backward pass for heads of this width."""
    if dtype == "float32":
        return (Tile(32, 32, 4), Tile(32, 32, 4))
    if width > 128:
        return Tile(64, 32, 4), Tile(32, 32, 4)
    return Tile(128, 64, 8 if width > 64 else 4), Tile(64, 64, 4)


def forward(gpu, given, lists, options, tile):
    """Computes attention.

    Args:
        gpu: a `Gpu`.
        given: `Given`.
        lists: `Lists`, the blocks of keys for each block of queries.
        options: `Options`.
        tile: a `Tile`.

    Returns:
        `(outputs, logs)`: `(b, t, h, c)` in the dtype of the query, and the binary logarithms of the sums of the
        weights, `(b, h, t)` float32.
    """
    b, t, h, _ = given.query.shape
    outputs = [(tuple(given.query.shape), given.query.dtype), ((b, h, t), "float32")]
    return _launched(gpu, "attention_forward", (b * h, _count(t, tile.rows)), (*given, *lists), outputs, options, tile)


def gradients(gpu, given, lists, key_lists, grad, logs, dots, options, tile):
    """Computes the gradients of query, key and value.

    Args:
        gpu, given, options, tile: as in `forward`.
        lists: as in `forward`, for this tile.
        key_lists: `Lists`, the blocks of queries for each block of keys.
        grad: `(b, t, h, c)`, the gradient of the outputs.
        logs: from `forward`.
        dots: `(b, h, t)` float32, the products of outputs and their gradients, summed over c.
    """
    (b, t, h, _), (_, s, g, _) = given.query.shape, given.key.shape
    (grad_query,) = _launched(
        gpu,
        "attention_query_gradient",
        (b * h, _count(t, tile.rows)),
        (*given, *lists, grad, logs, dots),
        [(tuple(given.query.shape), given.query.dtype)],
        options,
        tile,
    )
    grad_key, grad_value = _launched(
        gpu,
        "attention_key_gradient",
        (b * g, _count(s, tile.columns)),
        (*given, *key_lists, grad, logs, dots),
        [(tuple(given.key.shape), given.key.dtype), (tuple(given.value.shape), given.value.dtype)],
        options,
        tile,
    )
    return grad_query, grad_key, grad_value


def _launched(gpu, name, grid, inputs, outputs, options, tile):
    query, key, places = inputs[0], inputs[1], inputs[8]
    (_, t, heads, width), (_, s, groups, _) = query.shape, key.shape
    constants = dict(queries=t, keys=s, blocks=places.shape[1], listed=places.shape[2], scale=width**-0.5)
    constants |= dict(HEADS=heads, GROUPS=groups, WIDTH=width, BLOCK_WIDTH=max(16, power(width)))
    constants |= dict(ROWS=tile.rows, COLUMNS=tile.columns, CAUSAL=options.causal, WINDOW=options.window)
    constants |= dict(SINKS=options.sinks, PRECISION="ieee" if "float32" in str(query.dtype) else "tf32")
    kernel = _kernel(name)
    return gpu.launch(kernel, grid, inputs, outputs, constants, num_warps=tile.warps, num_stages=2)


def _kernel(name):
    # Imported lazily: Triton may be missing.
    from keras_jamba._triton import attention_kernels

    return getattr(attention_kernels, name)


def _count(size, block):
    return -(-size // block)

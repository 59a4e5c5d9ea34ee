"""Launches of the kernels for rows sorted by expert: tiles, grids and outputs.

Every function takes a `Gpu` and arrays of its backend. `counts` `(x,)` int32 is the number of rows per expert, in the
order of the rows.
"""

from typing import NamedTuple

from keras_jamba._triton import tuning
from keras_jamba._triton.tuning import power

# A program of `bank_gradient` takes at least this many steps, so that starting it costs little.
_LEAST_STEPS = 4
_PROGRAMS_PER_MULTIPROCESSOR = 2
# Arrays of row indices, and the array that each one indexes; `target` indexes the result.
_NAMED = {"source": "x", "a_source": "a", "b_source": "b", "target": "target"}


class Tiles(NamedTuple):
    """Work of one program: rows and columns of the result, and `depth` terms of the sum per step.

    The `strip` row tiles of a strip share reads through the cache. `warps` and `stages` are Triton's `num_warps` and
    `num_stages`.
    """

    rows: int
    columns: int
    depth: int
    strip: int
    warps: int
    stages: int

    def constants(self):
        return dict(BM=self.rows, BN=self.columns, BK=self.depth, STRIP=self.strip)


# For devices with less shared memory than those of the rules, or with other arithmetic units.
OTHERS = [
    Tiles(128, 128, 64, 16, 8, 3),
    Tiles(128, 128, 32, 16, 8, 3),
    Tiles(128, 64, 64, 16, 4, 3),
    Tiles(64, 128, 32, 16, 4, 3),
    Tiles(64, 64, 64, 16, 4, 3),
    Tiles(64, 64, 32, 16, 4, 2),
    Tiles(32, 64, 32, 16, 4, 2),
]


def tiles_for(share, depth, columns, dtype, sums=1):
    """Returns tiles for about `share` rows per expert and `sums` accumulators per program."""
    if dtype.itemsize > 2:
        tiles = Tiles(128, 128 // sums, 32, 16, 8, 3) if share > 64 else Tiles(64, 64 // sums, 32, 16, 4, 3)
    elif depth % 8 or columns % 8:
        tiles = Tiles(64, 128 // sums, 32, 16, 4, 3)  # unaligned rows: element-wise addresses
    elif share > 64:
        tiles = Tiles(128, 256 // sums, 64, 16, 8, 4)
    elif share > 32:
        tiles = Tiles(64, 128 // sums, 64, 16, 4, 4)
    else:
        # Bound by reading the weights once.
        tiles = Tiles(16 if share <= 16 else 32, 64 // sums, 128, 16, 4, 4)
    fit = lambda size, most: max(16, min(most, power(size)))  # noqa: E731
    return tiles._replace(columns=fit(columns, tiles.columns), depth=fit(depth, tiles.depth))


def first_product(gpu, x, source, counts, up_bank, gate_bank=None, keep=False, tiles=None):
    """Computes the first layer of the experts for the rows of `x` at `source`.

    Args:
        gpu: a `Gpu`.
        x: `(s, d)`.
        source: `(rows,)`, the row of `x` of each row.
        counts: `(x,)`.
        up_bank, gate_bank: `(x, d, f)`; gate_bank may be None.
        keep: whether to also return the matrix products, for the gradient.
        tiles: `Tiles`, or None to choose them.

    Returns:
        `hidden` `(rows, f)`. With `keep`, `(hidden, up, gate)`: also the products with `up_bank` and `gate_bank`, None
        without a gate bank.
    """
    experts, d, f = up_bank.shape
    rows, gated = source.shape[0], gate_bank is not None
    if tiles is None:
        rule = tiles_for(rows / experts, d, f, x.dtype, 1 + gated)
        arrays = dict(x=x, source=source, counts=counts, up_bank=up_bank, gate_bank=gate_bank)
        run = lambda gpu, tiles, arrays: first_product(gpu, **arrays, keep=keep, tiles=tiles)  # noqa: E731
        tiles = _chosen(gpu, "first_product", rule, arrays, rows, run)
    shape = (rows, f)
    outputs = [(shape, x.dtype), (shape if keep else (1,), x.dtype), (shape if keep and gated else (1,), x.dtype)]
    constants = dict(K=d, N=f, GATED=gated, GATHERED=True, KEPT=keep)
    inputs = (x, source, counts, up_bank, gate_bank if gated else up_bank)
    grid = _grid_of_rows(rows, experts, f, tiles)
    hidden, up, gate = _launched(gpu, "first_product", grid, inputs, outputs, constants, experts, tiles)
    return (hidden, up, gate if gated else None) if keep else hidden


def rows_product(
    gpu, x, bank, counts, other=None, *, transpose_rhs=False, source=None, target=None, scale=None, tiles=None
):
    """Multiplies rows by the matrix of their expert.

    Args:
        gpu: a `Gpu`.
        x: `(rows, inner)`; with `source`, the array that it indexes.
        bank: `(x, inner, outer)`, or `(x, outer, inner)` with `transpose_rhs`.
        counts: `(x,)`.
        other: another `(x, bank)` whose product is added, or None.
        transpose_rhs: whether the matrices are transposed.
        source: `(rows,)`, the row of `x` of each row; None for the same row.
        target: `(rows,)`, the row of the result of each row; None for the same row.
        scale: `(rows,)`, a factor per row of the result, or None; requires `target`.
        tiles: `Tiles`, or None to choose them.

    Returns:
        `(rows, outer)` in the dtype of `x`.
    """
    experts, inner, outer = bank.shape
    inner, outer = (outer, inner) if transpose_rhs else (inner, outer)
    rows = (x if source is None else source).shape[0]
    if tiles is None:
        arrays = dict(x=x, bank=bank, counts=counts, source=source, target=target, scale=scale)
        arrays |= dict(zip(("other_x", "other_bank"), other or (None, None), strict=True))

        def run(gpu, tiles, given):
            other = (given["other_x"], given["other_bank"]) if "other_x" in given else None
            given = {name: x for name, x in given.items() if not name.startswith("other")}
            return rows_product(gpu, **given, other=other, transpose_rhs=transpose_rhs, tiles=tiles)

        tiles = _chosen(gpu, "rows_product", tiles_for(rows / experts, inner, outer, x.dtype), arrays, rows, run)
    constants = dict(K=inner, N=outer, TRANSPOSE_RHS=transpose_rhs, TWO=other is not None, GATHERED=source is not None)
    constants |= dict(SCATTERED=target is not None, SCALED=scale is not None)
    inputs = (x, bank, *(other or (x, bank)), *(counts if each is None else each for each in (source, target)))
    inputs += (x if scale is None else scale, counts)
    grid, outputs = _grid_of_rows(rows, experts, outer, tiles), [((rows, outer), x.dtype)]
    return _launched(gpu, "rows_product", grid, inputs, outputs, constants, experts, tiles)[0]


def bank_gradient(gpu, a, b, counts, a_source=None, b_source=None, tiles=None):
    """Computes for each expert the transposed rows of `a` times the rows of `b`: `(x, columns of a, columns of b)`.

    `a_source` and `b_source` are as `source` in `rows_product`. If the tiles of the result are fewer than the programs
    that fill the device, several programs share the rows of a tile, and their float32 sums are added.
    """
    experts, m, n = counts.shape[0], a.shape[1], b.shape[1]
    rows = (a if a_source is None else a_source).shape[0]
    if tiles is None:
        rule = _for_a_bank(rows / experts, m, n, a.dtype, a_source is not None or b_source is not None)
        arrays = dict(a=a, b=b, counts=counts, a_source=a_source, b_source=b_source)
        run = lambda gpu, tiles, arrays: bank_gradient(gpu, **arrays, tiles=tiles)  # noqa: E731
        tiles = _chosen(gpu, "bank_gradient of shared sums", rule, arrays, rows, run)
    constants = dict(M=m, N=n, A_GATHERED=a_source is not None, B_GATHERED=b_source is not None)
    inputs = (a, b, *(counts if each is None else each for each in (a_source, b_source)), counts)
    programs = experts * _tiles(m, tiles.rows) * _tiles(n, tiles.columns)
    splits = _splits(gpu, programs, rows // (experts * tiles.depth))
    shape = (experts, m, n)
    outputs = [((splits, *shape), "float32") if splits > 1 else (shape, a.dtype)]
    constants["SPLITS"] = splits
    (sums,) = _launched(gpu, "bank_gradient", (programs, splits), inputs, outputs, constants, experts, tiles)
    return gpu.cast(sums.sum(0), a.dtype) if splits > 1 else sums


def _splits(gpu, programs, steps):
    """Returns how many programs share one sum of about `steps` steps, so that `programs` of them fill the device."""
    return max(1, min(_PROGRAMS_PER_MULTIPROCESSOR * gpu.multiprocessors // programs, steps // _LEAST_STEPS))


def activation(gpu, up, gate=None):
    """Computes `silu(gate) * up`, or `gelu(up)` without a gate, of `(rows, f)`."""
    rows, f = up.shape
    constants = dict(N=f, GATED=gate is not None, BN=min(2048, power(f)))
    inputs = (up, up if gate is None else gate)
    outputs = [(up.shape, up.dtype)]
    return gpu.launch(_kernel("activation"), (rows,), inputs, outputs, constants, num_warps=8, num_stages=1)[0]


def activation_gradient(gpu, gradient, up, gate, scale=None, target=None):
    """Computes the gradients of an activation, whose output has the weights `scale[target]` if given.

    Args:
        gpu: a `Gpu`.
        gradient: `(rows, f)`, the gradient of `activation(up, gate)` for a weight of one.
        up, gate: `(rows, f)`; gate may be None.
        scale: `(rows,)`, the weights, or None.
        target: `(rows,)`, the index of each row's weight, or None.

    Returns:
        `(grad_up, grad_gate, grad_scale, hidden)`: grad_gate is None without a gate, and hidden is the weighted
        `activation(up, gate)`. Without weights, the last two are not written.
    """
    (rows, f), gated, weighted = up.shape, gate is not None, scale is not None
    constants = dict(N=f, GATED=gated, WEIGHTED=weighted, BN=min(2048, power(f)))
    wide, none = ((rows, f), up.dtype), ((1,), up.dtype)
    outputs = [wide, wide if gated else none, *([wide, ((rows,), scale.dtype)] if weighted else [none, none])]
    inputs = (gradient, up, gate if gated else up, *((scale, target) if weighted else (up, up)))
    kernel = _kernel("activation_gradient")
    d_up, d_gate, hidden, d_scale = gpu.launch(kernel, (rows,), inputs, outputs, constants, num_warps=8, num_stages=1)
    return d_up, d_gate if gated else None, d_scale, hidden


def combination(gpu, x, place, scale=None, other=None):
    """Computes `(s, d)`: the sum of the rows of `x` at `place` `(s, k)`, weighted by `scale` `(s, k)` if given.

    If `other` is given, its rows are added to those of `x` first.
    """
    (tokens, per_token), d = place.shape, x.shape[1]
    constants = dict(D=d, PER_TOKEN=per_token, SCALED=scale is not None, TWO=other is not None)
    constants["BN"] = min(1024, power(d))
    inputs = (x, x if other is None else other, place, x if scale is None else scale)
    outputs = [((tokens, d), x.dtype)]
    return gpu.launch(_kernel("combination"), (tokens,), inputs, outputs, constants, num_warps=4, num_stages=1)[0]


def _chosen(gpu, name, rule, arrays, rows, run):
    """Returns `rule`, or measured tiles for this class of shapes if `tuning` measures."""
    if not tuning.measures(gpu):
        return rule
    arrays = {name: x for name, x in arrays.items() if x is not None}
    sizes = {name: [power(size) * (1 if size % 8 else -1) for size in x.shape] for name, x in arrays.items()}
    dtype = str(next(iter(arrays.values())).dtype).removeprefix("torch.")
    others = [_no_larger(tiles, rule) for tiles in OTHERS]
    return tuning.chosen(gpu, name, (dtype, *sizes.items()), rule, others, _sample(arrays, rows), run)


def _sample(arrays, rows):
    """Returns the specs of arrays to measure with: two experts only, whose banks fit into memory during training."""
    experts = arrays["counts"].shape[0]
    measured = min(experts, 2)

    def first(name, x):
        if name == "counts" or name.endswith("bank"):
            return measured
        return rows * measured // experts if x.shape[0] == rows else x.shape[0]

    shapes = {name: (first(name, x), *x.shape[1:]) for name, x in arrays.items()}
    values = {name: range(shapes[_NAMED[name]][0]) for name in arrays if name in _NAMED} | {"counts": rows // experts}
    return {name: (shapes[name], x.dtype, values.get(name, 0.5)) for name, x in arrays.items()}


def _no_larger(tiles, rule):
    """Returns `tiles` with the rows and columns limited to those of the rule, which fit the arrays and a program."""
    return tiles._replace(rows=min(tiles.rows, rule.rows), columns=min(tiles.columns, rule.columns))


def _for_a_bank(share, m, n, dtype, gathered):
    """Returns tiles for `bank_gradient`, which sums over the rows of an expert."""
    if dtype.itemsize > 2:
        tiles = Tiles(128, 128, 32, 16, 8, 3)
    elif m % 8 or n % 8:
        tiles = Tiles(64, 128, 32, 16, 4, 3)
    else:
        # The loads of row indices take two of the stages.
        tiles = Tiles(128, 256, 64, 16, 8, 5 if gathered else 4)
    if share <= 32:
        tiles = tiles._replace(depth=max(16, min(tiles.depth, power(int(share) + 1))))
    fit = lambda size, most: max(16, min(most, power(size)))  # noqa: E731
    return tiles._replace(rows=fit(m, tiles.rows), columns=fit(n, tiles.columns))


def _grid_of_rows(rows, experts, columns, tiles):
    """Returns a grid for the most tiles that any routing needs: full tiles, and one more per expert."""
    return (min(rows, rows // tiles.rows + experts) * _tiles(columns, tiles.columns),)


def _launched(gpu, name, grid, inputs, outputs, constants, experts, tiles):
    constants = constants | dict(EXPERTS=experts, EXPERTS_PADDED=power(experts)) | tiles.constants()
    return gpu.launch(_kernel(name), grid, inputs, outputs, constants, num_warps=tiles.warps, num_stages=tiles.stages)


def _kernel(name):
    # Imported lazily: Triton may be missing.
    from keras_jamba._triton import grouped_kernels

    return getattr(grouped_kernels, name)


def _tiles(size, tile):
    return -(-size // tile)

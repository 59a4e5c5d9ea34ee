"""How the kernels for rows sorted by expert are launched: their tiles, their grids, what they put out.

Every function takes a `Gpu` first, and arrays of whoever launches. `counts` `(x,)` int32 says how many of the rows each
expert has, in their order.
"""

from typing import NamedTuple

from keras_jamba._triton import tuning
from keras_jamba._triton.tuning import power

# Row numbers, and the array whose rows they are; a target's are those of the result.
_NAMED = {"source": "x", "a_source": "a", "b_source": "b", "target": "target"}


class Tiles(NamedTuple):
    """What one program works on: rows and columns of the result, and `depth` of the sum at a time.

    `strip` tiles of rows share what they read; the last two are Triton's `num_warps` and `num_stages`.
    """

    rows: int
    columns: int
    depth: int
    strip: int
    warps: int
    stages: int

    def constants(self):
        return dict(BM=self.rows, BN=self.columns, BK=self.depth, STRIP=self.strip)


# For devices with less room than the rules were measured on, or other arithmetic.
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
    """Tiles for about `share` rows an expert, with `sums` results of a program side by side."""
    if dtype.itemsize > 2:
        tiles = Tiles(128, 128 // sums, 32, 16, 8, 3) if share > 64 else Tiles(64, 64 // sums, 32, 16, 4, 3)
    elif depth % 8 or columns % 8:
        tiles = Tiles(64, 128 // sums, 32, 16, 4, 3)  # addresses element by element
    elif share > 64:
        tiles = Tiles(128, 256 // sums, 64, 16, 8, 4)
    elif share > 32:
        tiles = Tiles(64, 128 // sums, 64, 16, 4, 4)
    else:
        # The weights are read once, and nothing else matters.
        tiles = Tiles(16 if share <= 16 else 32, 64 // sums, 128, 16, 4, 4)
    fit = lambda size, most: max(16, min(most, power(size)))  # noqa: E731
    return tiles._replace(columns=fit(columns, tiles.columns), depth=fit(depth, tiles.depth))


def first_product(gpu, x, source, counts, up_bank, gate_bank=None, keep=False, tiles=None):
    """The rows of `x` that `source` names through their experts' first layer.

    Returns:
        `hidden` `(rows, f)`, and where `keep` also the products with `up_bank` and `gate_bank` (None where that is).
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
    """Rows times the matrix of their expert.

    Args:
        x: `(rows, k)`, or where `source` `(rows,)` is given, those that it names.
        bank: `(x, k, n)`, or where `transpose_rhs` `(x, n, k)`.
        other: another `(x, bank)` whose product is added.
        target: `(rows,)`, the row of the result that each goes to; None is its own.
        scale: `(rows,)` by rows of the result, or None; with a target.
    """
    experts, k, n = bank.shape
    k, n = (n, k) if transpose_rhs else (k, n)
    rows = (x if source is None else source).shape[0]
    if tiles is None:
        arrays = dict(x=x, bank=bank, counts=counts, source=source, target=target, scale=scale)
        arrays |= dict(zip(("other_x", "other_bank"), other or (None, None), strict=True))

        def run(gpu, tiles, given):
            other = (given["other_x"], given["other_bank"]) if "other_x" in given else None
            given = {name: x for name, x in given.items() if not name.startswith("other")}
            return rows_product(gpu, **given, other=other, transpose_rhs=transpose_rhs, tiles=tiles)

        tiles = _chosen(gpu, "rows_product", tiles_for(rows / experts, k, n, x.dtype), arrays, rows, run)
    constants = dict(K=k, N=n, TRANSPOSE_RHS=transpose_rhs, TWO=other is not None, GATHERED=source is not None)
    constants |= dict(SCATTERED=target is not None, SCALED=scale is not None)
    inputs = (x, bank, *(other or (x, bank)), *(counts if each is None else each for each in (source, target)))
    inputs += (x if scale is None else scale, counts)
    grid, outputs = _grid_of_rows(rows, experts, n, tiles), [((rows, n), x.dtype)]
    return _launched(gpu, "rows_product", grid, inputs, outputs, constants, experts, tiles)[0]


def bank_gradient(gpu, a, b, counts, a_source=None, b_source=None, tiles=None):
    """`(x, m, n)`: for each expert its rows of `a`, transposed, times its rows of `b`; sources as in `rows_product`."""
    experts, m, n = counts.shape[0], a.shape[1], b.shape[1]
    rows = (a if a_source is None else a_source).shape[0]
    if tiles is None:
        rule = _for_a_bank(rows / experts, m, n, a.dtype, a_source is not None or b_source is not None)
        arrays = dict(a=a, b=b, counts=counts, a_source=a_source, b_source=b_source)
        run = lambda gpu, tiles, arrays: bank_gradient(gpu, **arrays, tiles=tiles)  # noqa: E731
        tiles = _chosen(gpu, "bank_gradient", rule, arrays, rows, run)
    constants = dict(M=m, N=n, A_GATHERED=a_source is not None, B_GATHERED=b_source is not None)
    inputs = (a, b, *(counts if each is None else each for each in (a_source, b_source)), counts)
    grid = (experts * _tiles(m, tiles.rows) * _tiles(n, tiles.columns),)
    outputs = [((experts, m, n), a.dtype)]
    return _launched(gpu, "bank_gradient", grid, inputs, outputs, constants, experts, tiles)[0]


def activation(gpu, up, gate=None):
    """`silu(gate) * up`, or `gelu(up)`, of `(rows, f)`."""
    rows, f = up.shape
    constants = dict(N=f, GATED=gate is not None, BN=min(2048, power(f)))
    inputs = (up, up if gate is None else gate)
    outputs = [(up.shape, up.dtype)]
    return gpu.launch(_kernel("activation"), (rows,), inputs, outputs, constants, num_warps=8, num_stages=1)[0]


def activation_gradient(gpu, gradient, up, gate, scale, target):
    """Back through an expert's first layer, whose result was weighted by `scale[target]` later.

    Args:
        gradient: `(rows, f)`, of `activation(up, gate)` as if its weight were one.
        scale: `(rows,)`; target: `(rows,)`, where each row's weight is.

    Returns:
        The gradients of `up`, of `gate` (None where that is) and of `scale`, and `activation(up, gate)` weighted.
    """
    (rows, f), gated = up.shape, gate is not None
    constants = dict(N=f, GATED=gated, BN=min(2048, power(f)))
    wide = ((rows, f), up.dtype)
    outputs = [wide, wide if gated else ((1,), up.dtype), wide, ((rows,), scale.dtype)]
    inputs = (gradient, up, gate if gated else up, scale, target)
    kernel = _kernel("activation_gradient")
    d_up, d_gate, hidden, d_scale = gpu.launch(kernel, (rows,), inputs, outputs, constants, num_warps=8, num_stages=1)
    return d_up, d_gate if gated else None, d_scale, hidden


def combination(gpu, x, place, scale=None, other=None):
    """`(s, d)`: the sum of the rows of `x` that `place` `(s, k)` names, weighted by `scale` `(s, k)` where given.

    Each row is that of `x` plus that of `other`, where given.
    """
    (tokens, per_token), d = place.shape, x.shape[1]
    constants = dict(D=d, PER_TOKEN=per_token, SCALED=scale is not None, TWO=other is not None)
    constants["BN"] = min(1024, power(d))
    inputs = (x, x if other is None else other, place, x if scale is None else scale)
    outputs = [((tokens, d), x.dtype)]
    return gpu.launch(_kernel("combination"), (tokens,), inputs, outputs, constants, num_warps=4, num_stages=1)[0]


def _chosen(gpu, name, rule, arrays, rows, run):
    """`rule`, or where `tuning` measures, tiles for arrays of such shapes."""
    if not tuning.measures(gpu):
        return rule
    arrays = {name: x for name, x in arrays.items() if x is not None}
    sizes = {name: [power(size) * (1 if size % 8 else -1) for size in x.shape] for name, x in arrays.items()}
    dtype = str(next(iter(arrays.values())).dtype).removeprefix("torch.")
    others = [_no_larger(tiles, rule) for tiles in OTHERS]
    return tuning.chosen(gpu, name, (dtype, *sizes.items()), rule, others, _sample(arrays, rows), run)


def _sample(arrays, rows):
    """What is measured with: two experts, so that their banks find room in the middle of a training."""
    experts = arrays["counts"].shape[0]
    few = min(experts, 2)

    def first(name, x):
        if name == "counts" or name.endswith("bank"):
            return few
        return rows * few // experts if x.shape[0] == rows else x.shape[0]

    shapes = {name: (first(name, x), *x.shape[1:]) for name, x in arrays.items()}
    values = {name: range(shapes[_NAMED[name]][0]) for name in arrays if name in _NAMED} | {"counts": rows // experts}
    return {name: (shapes[name], x.dtype, values.get(name, 0.5)) for name, x in arrays.items()}


def _no_larger(tiles, rule):
    """In rows and columns: the rule's are no larger than the arrays, or than what a program has room for."""
    return tiles._replace(rows=min(tiles.rows, rule.rows), columns=min(tiles.columns, rule.columns))


def _for_a_bank(share, m, n, dtype, gathered):
    """Here the rows of an expert are what is summed over."""
    if dtype.itemsize > 2:
        tiles = Tiles(128, 128, 32, 16, 8, 3)
    elif m % 8 or n % 8:
        tiles = Tiles(64, 128, 32, 16, 4, 3)
    else:
        # What names the rows takes two of the stages.
        tiles = Tiles(128, 256, 64, 16, 8, 5 if gathered else 4)
    if share <= 32:
        tiles = tiles._replace(depth=max(16, min(tiles.depth, power(int(share) + 1))))
    fit = lambda size, most: max(16, min(most, power(size)))  # noqa: E731
    return tiles._replace(rows=fit(m, tiles.rows), columns=fit(n, tiles.columns))


def _grid_of_rows(rows, experts, columns, tiles):
    """Room for the most tiles that any routing needs: full ones, and one more for each expert."""
    return (min(rows, rows // tiles.rows + experts) * _tiles(columns, tiles.columns),)


def _launched(gpu, name, grid, inputs, outputs, constants, experts, tiles):
    constants = constants | dict(EXPERTS=experts, ROOM=power(experts)) | tiles.constants()
    return gpu.launch(_kernel(name), grid, inputs, outputs, constants, num_warps=tiles.warps, num_stages=tiles.stages)


def _kernel(name):
    # Only here, where Triton is.
    from keras_jamba._triton import grouped_kernels

    return getattr(grouped_kernels, name)


def _tiles(size, tile):
    return -(-size // tile)

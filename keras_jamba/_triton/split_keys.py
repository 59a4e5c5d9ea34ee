"""Launches of the kernels of attention with few queries: how many programs share the keys."""

from keras_jamba._signature import ATTENTION
from keras_jamba._triton import Program
from keras_jamba._triton.convolution import _tiles
from keras_jamba._triton.tuning import power

# Programs per multiprocessor; one more range of keys writes and reads one more result per query and head.
_PROGRAMS, _MOST_SPLITS = 4, 256
_CHANNELS = 32  # per program of `merged_attention`


def forward(gpu, tensors, options, train):
    """Computes attention; see `grouped_query_attention` for the tensors and options."""
    query, key, sinks = tensors["query"], tensors["key"], tensors["sinks"]
    (b, t, h, c), (_, s, g, _) = query.shape, key.shape
    is_single = any("float32" in str(tensors[name].dtype) for name in ("query", "key", "value"))
    rows, columns, warps = tile(t * h // g, c, is_single)
    tiles, most = _tiles(t * h // g, rows), _tiles(s, columns)
    splits = min(_MOST_SPLITS, most, max(1, _PROGRAMS * gpu.multiprocessors // (b * g * tiles)))
    per_split = _tiles(most, splits) * columns
    splits = _tiles(s, per_split)
    inputs = [tensors[name] for name in SPLIT_KEYS.inputs[:7]]
    constants = dict(rows=b * t * h, queries=t, keys=s, keys_per_split=per_split, scale=c**-0.5)
    constants |= dict(HEADS=h, GROUPS=g, WIDTH=c, BLOCK_WIDTH=max(16, power(c)), ROWS=rows, COLUMNS=columns)
    constants |= dict(CAUSAL=bool(options["causal"]), WINDOW=options["window"], SINKS=sinks is not None)
    constants |= dict(PRECISION="ieee" if "float32" in str(query.dtype) else "tf32")
    mixtures, logs = gpu.launch(
        _kernel("split_attention"),
        (b * g, tiles, splits),
        (*inputs, inputs[-1] if sinks is None else sinks),
        [((splits, b, t, h, c), "float32"), ((splits, b, t, h), "float32")],
        constants,
        num_warps=warps,
        num_stages=3,
    )
    constants = dict(rows=b * t * h, splits=splits, WIDTH=c, CHANNELS=_CHANNELS, SPLITS=power(splits))
    return gpu.launch(
        _kernel("merged_attention"),
        (b * t * h, _tiles(c, _CHANNELS)),
        (mixtures, logs),
        [((b, t, h, c), query.dtype)],
        constants,
        num_warps=4,
        num_stages=1,
    )


def tile(pairs, width, is_single):
    """Returns pairs of a query and a head per program, keys per block, and warps.

    Args:
        pairs: the number of pairs per key-value head.
        width: of a head.
        is_single: whether a tensor is float32.
    """
    # The shared memory of a multiprocessor must suffice, also of GPUs with 99 KiB.
    most = 16 if is_single and width > 128 else 32 if is_single or width > 128 else 64
    return min(max(16, power(pairs)), most), max(32, most), 2


SPLIT_KEYS = Program(
    name="triton_split_keys",
    **ATTENTION,
    forward=forward,
    backward=None,
    strided=(),
    registers=None,
)


def _kernel(name):
    # Imported lazily: Triton may be missing.
    from keras_jamba._triton import split_keys_kernels

    return getattr(split_keys_kernels, name)

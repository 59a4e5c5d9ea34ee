"""Attention of a few queries on a GPU, in Triton: the keys are split among programs (Flash-Decoding, Dao et al. 2023).

A program of `split_attention` has ROWS pairs of a query and a head, all of one key-value head, and a range of the keys.
`merged_attention` combines the ranges. Scores are in powers of two.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from keras_jamba._triton.attention_kernels import _LOG2_E, _LOW, _seen, _softmax_step, _tile


@triton.jit
def split_attention(
    query,
    key,
    value,
    positions,
    documents,
    key_positions,
    key_documents,
    sinks,
    mixtures,
    logs,
    rows,
    queries,
    keys,
    keys_per_split,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores the mean of the values of a range, `(splits, b, t, h, c)`, and the logarithm of the sum of its weights."""
    repeats: tl.constexpr = HEADS // GROUPS
    b, g, split = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS, tl.program_id(2)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here = i < queries * repeats
    t = b * queries + i // repeats
    # The row of a query and a head among all `b * t * h`.
    row = t * HEADS + g * repeats + i % repeats
    c = tl.arange(0, BLOCK_WIDTH)
    place, stored = row[:, None] * WIDTH + c[None, :], here[:, None] & (c < WIDTH)[None, :]
    q = tl.load(query + place, mask=stored, other=0.0)
    position = tl.load(positions + t, mask=here, other=0)[:, None]
    document = tl.load(documents + t, mask=here, other=-2147483647)[:, None]
    key += b * keys * GROUPS * WIDTH
    value += b * keys * GROUPS * WIDTH
    top = tl.full([ROWS], _LOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    first = split * keys_per_split
    for start in range(first, tl.minimum(first + keys_per_split, keys), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        there = j < keys
        key_position = tl.load(key_positions + b * keys + j, mask=there, other=0)[None, :]
        key_document = tl.load(key_documents + b * keys + j, mask=there, other=-2147483648)[None, :]
        sink = tl.load(sinks + b * keys + j, mask=there, other=0)[None, :] if SINKS else 0
        seen = _seen(position, document, key_position, key_document, sink, CAUSAL, WINDOW, SINKS)
        # Keys that no query sees, such as empty slots of a cache, are not read.
        there = there & (tl.max(seen.to(tl.int32), 0) > 0)
        k = _tile(key, j, there, GROUPS, g, WIDTH, BLOCK_WIDTH).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
        weights, kept_share, top, total = _softmax_step(scores, seen, top, total)
        v = _tile(value, j, there, GROUPS, g, WIDTH, BLOCK_WIDTH).to(q.dtype)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * kept_share[:, None], input_precision=PRECISION)
    total = tl.maximum(total, 1e-30)
    tl.store(mixtures + split.to(tl.int64) * rows * WIDTH + place, mixed / total[:, None], mask=stored)
    tl.store(logs + split.to(tl.int64) * rows + row, top + tl.log2(total), mask=here)


@triton.jit
def merged_attention(
    mixtures,
    logs,
    outputs,
    rows,
    splits,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Stores the mean of all ranges `(b, t, h, c)`. A program has one query, one head and CHANNELS channels."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.arange(0, SPLITS)
    there = split < splits
    log = tl.load(logs + split * rows + row, mask=there, other=_LOW)
    shares = tl.where(there, tl.exp2(log - tl.max(log, 0)), 0.0)
    place = (split * rows + row)[:, None] * WIDTH + c[None, :]
    mixed = tl.load(mixtures + place, mask=there[:, None] & (c < WIDTH)[None, :], other=0.0)
    mixed = tl.sum(mixed * shares[:, None], 0) / tl.sum(shares, 0)
    tl.store(outputs + row * WIDTH + c, mixed.to(outputs.dtype.element_ty), mask=c < WIDTH)

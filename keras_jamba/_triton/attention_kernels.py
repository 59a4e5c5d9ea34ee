"""Attention on a GPU, in Triton: FlashAttention-2 with documents, windows and sinks (Dao 2023, algorithms 1 and 2).

A program of `attention_forward` and `attention_query_gradient` has ROWS queries of one head, and reads the blocks of
COLUMNS keys that its row of `places` lists. A program of `attention_key_gradient` has COLUMNS keys of one key-value
head, and reads blocks of ROWS queries of all its query heads. Scores are in powers of two.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

_LOW: tl.constexpr = tl.constexpr(-1e30)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(pointer, token, length, heads, head, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Loads the tokens `token (n,)` of a head as `(n, BLOCK_WIDTH)`; zeros outside of the row."""
    c = tl.arange(0, BLOCK_WIDTH)
    place = (token.to(tl.int64)[:, None] * heads + head) * WIDTH + c[None, :]
    return tl.load(pointer + place, mask=(token < length)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(pointer, x, token, length, heads, head, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    c = tl.arange(0, BLOCK_WIDTH)
    place = (token.to(tl.int64)[:, None] * heads + head) * WIDTH + c[None, :]
    tl.store(pointer + place, x.to(pointer.dtype.element_ty), mask=(token < length)[:, None] & (c < WIDTH)[None, :])


@triton.jit
def _seen(
    position,
    document,
    key_position,
    key_document,
    sink,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Returns whether each query sees each key, from tensors that broadcast to the shape of the scores."""
    seen = document == key_document
    distance = position - key_position
    if WINDOW > 0:
        near = tl.abs(distance) < WINDOW
        if SINKS:
            near = near | (sink > 0)
        seen = seen & near
    if CAUSAL:
        seen = seen & (distance >= 0)
    return seen


@triton.jit
def attention_forward(
    query,
    key,
    value,
    positions,
    documents,
    key_positions,
    key_documents,
    sinks,
    places,
    counts,
    outputs,
    logs,
    queries,
    keys,
    blocks,
    listed,
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
    block, b, h = tl.program_id(1), (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    g = h // (HEADS // GROUPS)
    query += b * queries * HEADS * WIDTH
    key += b * keys * GROUPS * WIDTH
    value += b * keys * GROUPS * WIDTH
    i = block * ROWS + tl.arange(0, ROWS)
    here = i < queries
    q = _tile(query, i, queries, HEADS, h, WIDTH, BLOCK_WIDTH)
    position = tl.load(positions + b * queries + i, mask=here, other=0)[:, None]
    document = tl.load(documents + b * queries + i, mask=here, other=-2147483647)[:, None]
    top = tl.full([ROWS], _LOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    places += (b * blocks + block) * listed
    for n in range(0, tl.load(counts + b * blocks + block)):
        j = tl.load(places + n) * COLUMNS + tl.arange(0, COLUMNS)
        there = j < keys
        k = _tile(key, j, keys, GROUPS, g, WIDTH, BLOCK_WIDTH)
        key_position = tl.load(key_positions + b * keys + j, mask=there, other=0)[None, :]
        key_document = tl.load(key_documents + b * keys + j, mask=there, other=-2147483648)[None, :]
        sink = tl.load(sinks + b * keys + j, mask=there, other=0)[None, :] if SINKS else 0
        seen = _seen(position, document, key_position, key_document, sink, CAUSAL, WINDOW, SINKS)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
        scores = tl.where(seen, scores, _LOW)
        new = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - new[:, None]), 0.0)
        kept = tl.exp2(top - new)
        total = total * kept + tl.sum(weights, 1)
        v = _tile(value, j, keys, GROUPS, g, WIDTH, BLOCK_WIDTH)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * kept[:, None], input_precision=PRECISION)
        top = new
    total = tl.maximum(total, 1e-30)
    _store(outputs + b * queries * HEADS * WIDTH, mixed / total[:, None], i, queries, HEADS, h, WIDTH, BLOCK_WIDTH)
    tl.store(logs + (b * HEADS + h) * queries + i, top + tl.log2(total), mask=here)


@triton.jit
def attention_query_gradient(
    query,
    key,
    value,
    positions,
    documents,
    key_positions,
    key_documents,
    sinks,
    places,
    counts,
    grad,
    logs,
    dots,
    grad_query,
    queries,
    keys,
    blocks,
    listed,
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
    block, b, h = tl.program_id(1), (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    g = h // (HEADS // GROUPS)
    query += b * queries * HEADS * WIDTH
    grad += b * queries * HEADS * WIDTH
    key += b * keys * GROUPS * WIDTH
    value += b * keys * GROUPS * WIDTH
    i = block * ROWS + tl.arange(0, ROWS)
    here = i < queries
    q = _tile(query, i, queries, HEADS, h, WIDTH, BLOCK_WIDTH)
    do = _tile(grad, i, queries, HEADS, h, WIDTH, BLOCK_WIDTH)
    log = tl.load(logs + (b * HEADS + h) * queries + i, mask=here, other=0.0)[:, None]
    dot = tl.load(dots + (b * HEADS + h) * queries + i, mask=here, other=0.0)[:, None]
    position = tl.load(positions + b * queries + i, mask=here, other=0)[:, None]
    document = tl.load(documents + b * queries + i, mask=here, other=-2147483647)[:, None]
    total = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    places += (b * blocks + block) * listed
    for n in range(0, tl.load(counts + b * blocks + block)):
        j = tl.load(places + n) * COLUMNS + tl.arange(0, COLUMNS)
        there = j < keys
        k = _tile(key, j, keys, GROUPS, g, WIDTH, BLOCK_WIDTH)
        v = _tile(value, j, keys, GROUPS, g, WIDTH, BLOCK_WIDTH)
        key_position = tl.load(key_positions + b * keys + j, mask=there, other=0)[None, :]
        key_document = tl.load(key_documents + b * keys + j, mask=there, other=-2147483648)[None, :]
        sink = tl.load(sinks + b * keys + j, mask=there, other=0)[None, :] if SINKS else 0
        seen = _seen(position, document, key_position, key_document, sink, CAUSAL, WINDOW, SINKS)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
        weights = tl.where(seen, tl.exp2(scores - log), 0.0)
        of_scores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - dot)
        total = tl.dot(of_scores.to(k.dtype), k, total, input_precision=PRECISION)
    _store(grad_query + b * queries * HEADS * WIDTH, total * scale, i, queries, HEADS, h, WIDTH, BLOCK_WIDTH)


@triton.jit
def attention_key_gradient(
    query,
    key,
    value,
    positions,
    documents,
    key_positions,
    key_documents,
    sinks,
    places,
    counts,
    grad,
    logs,
    dots,
    grad_key,
    grad_value,
    queries,
    keys,
    blocks,
    listed,
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
    block, b, g = tl.program_id(1), (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    query += b * queries * HEADS * WIDTH
    grad += b * queries * HEADS * WIDTH
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    there = j < keys
    k = _tile(key + b * keys * GROUPS * WIDTH, j, keys, GROUPS, g, WIDTH, BLOCK_WIDTH)
    v = _tile(value + b * keys * GROUPS * WIDTH, j, keys, GROUPS, g, WIDTH, BLOCK_WIDTH)
    key_position = tl.load(key_positions + b * keys + j, mask=there, other=0)[:, None]
    key_document = tl.load(key_documents + b * keys + j, mask=there, other=-2147483648)[:, None]
    sink = tl.load(sinks + b * keys + j, mask=there, other=0)[:, None] if SINKS else 0
    of_key = tl.zeros([COLUMNS, BLOCK_WIDTH], tl.float32)
    of_value = tl.zeros([COLUMNS, BLOCK_WIDTH], tl.float32)
    places += (b * blocks + block) * listed
    for n in range(0, tl.load(counts + b * blocks + block)):
        i = tl.load(places + n) * ROWS + tl.arange(0, ROWS)
        here = i < queries
        position = tl.load(positions + b * queries + i, mask=here, other=0)[None, :]
        document = tl.load(documents + b * queries + i, mask=here, other=-2147483647)[None, :]
        seen = _seen(position, document, key_position, key_document, sink, CAUSAL, WINDOW, SINKS)
        for r in range(HEADS // GROUPS):
            h = g * (HEADS // GROUPS) + r
            q = _tile(query, i, queries, HEADS, h, WIDTH, BLOCK_WIDTH)
            do = _tile(grad, i, queries, HEADS, h, WIDTH, BLOCK_WIDTH)
            log = tl.load(logs + (b * HEADS + h) * queries + i, mask=here, other=0.0)[None, :]
            dot = tl.load(dots + (b * HEADS + h) * queries + i, mask=here, other=0.0)[None, :]
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2_E)
            weights = tl.where(seen, tl.exp2(scores - log), 0.0)
            of_value = tl.dot(weights.to(do.dtype), do, of_value, input_precision=PRECISION)
            of_scores = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - dot)
            of_key = tl.dot(of_scores.to(q.dtype), q, of_key, input_precision=PRECISION)
    _store(grad_key + b * keys * GROUPS * WIDTH, of_key * scale, j, keys, GROUPS, g, WIDTH, BLOCK_WIDTH)
    _store(grad_value + b * keys * GROUPS * WIDTH, of_value, j, keys, GROUPS, g, WIDTH, BLOCK_WIDTH)

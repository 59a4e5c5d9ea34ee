"""Attention on a GPU, in Triton: FlashAttention-2 with documents, windows and sinks (Dao 2023, algorithms 1 and 2).

A program of `attention_forward` and `attention_query_gradient` has ROWS queries of one head, and reads the blocks of
COLUMNS keys that its row of `places` lists. A program of `attention_key_gradient` has COLUMNS keys of one key-value
head, and reads blocks of ROWS queries of some of its query heads. Scores are in powers of two.

With ISOLATE, damaged tokens (see `token_damage`) count as zeros in products. What sees a damaged token becomes NaN.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

_LOW: tl.constexpr = tl.constexpr(-1e30)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(pointer, token, kept, heads, head, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Loads the tokens `token (n,)` of a head as `(n, BLOCK_WIDTH)`; zeros for those that are not `kept (n,)`."""
    c = tl.arange(0, BLOCK_WIDTH)
    place = (token.to(tl.int64)[:, None] * heads + head) * WIDTH + c[None, :]
    return tl.load(pointer + place, mask=kept[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def token_damage(x, damage, tokens, limit, LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores 1 for each row of `x (tokens, LENGTH)` with NaN or a magnitude of at least `limit`, else 0."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = tl.zeros([ROWS], tl.int32)
    for start in range(0, LENGTH, BLOCK):
        c = start + tl.arange(0, BLOCK)
        place = i.to(tl.int64)[:, None] * LENGTH + c[None, :]
        values = tl.load(x + place, mask=(i < tokens)[:, None] & (c < LENGTH)[None, :], other=0.0).to(tl.float32)
        # NaN is not below the limit.
        found = found | tl.max(tl.where(tl.abs(values) < limit, 0, 1), 1)
    tl.store(damage + i, found.to(tl.float32), mask=i < tokens)


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
def _softmax_step(scores, seen, top, total):
    """Returns the weights of a block, the share of the sums before it, and the maximum and sum of weights after it."""
    scores = tl.where(seen, scores, _LOW)
    new = tl.maximum(top, tl.max(scores, 1))
    weights = tl.where(seen, tl.exp2(scores - new[:, None]), 0.0)
    kept_share = tl.exp2(top - new)
    return weights, kept_share, new, total * kept_share + tl.sum(weights, 1)


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
    damage,
    key_damage,
    outputs,
    logs,
    marks,
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
    ISOLATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, b, h = tl.program_id(1), (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    g = h // (HEADS // GROUPS)
    query += b * queries * HEADS * WIDTH
    key += b * keys * GROUPS * WIDTH
    value += b * keys * GROUPS * WIDTH
    i = block * ROWS + tl.arange(0, ROWS)
    here = i < queries
    kept = here
    if ISOLATE:
        mark = tl.load(damage + b * queries + i, mask=here, other=0.0)
        kept = here & (mark == 0.0)
    q = _tile(query, i, kept, HEADS, h, WIDTH, BLOCK_WIDTH)
    position = tl.load(positions + b * queries + i, mask=here, other=0)[:, None]
    document = tl.load(documents + b * queries + i, mask=here, other=-2147483647)[:, None]
    top = tl.full([ROWS], _LOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    places += (b * blocks + block) * listed
    for n in range(0, tl.load(counts + b * blocks + block)):
        j = tl.load(places + n) * COLUMNS + tl.arange(0, COLUMNS)
        there = j < keys
        key_position = tl.load(key_positions + b * keys + j, mask=there, other=0)[None, :]
        key_document = tl.load(key_documents + b * keys + j, mask=there, other=-2147483648)[None, :]
        sink = tl.load(sinks + b * keys + j, mask=there, other=0)[None, :] if SINKS else 0
        seen = _seen(position, document, key_position, key_document, sink, CAUSAL, WINDOW, SINKS)
        if ISOLATE:
            key_mark = tl.load(key_damage + b * keys + j, mask=there, other=0.0)
            mark = tl.maximum(mark, tl.max(tl.where(seen, key_mark[None, :], 0.0), 1))
            there = there & (key_mark == 0.0)
        k = _tile(key, j, there, GROUPS, g, WIDTH, BLOCK_WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
        weights, kept_share, top, total = _softmax_step(scores, seen, top, total)
        v = _tile(value, j, there, GROUPS, g, WIDTH, BLOCK_WIDTH)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * kept_share[:, None], input_precision=PRECISION)
    total = tl.maximum(total, 1e-30)
    mixed = mixed / total[:, None]
    if ISOLATE:
        mixed = tl.where((mark > 0.0)[:, None], float("nan"), mixed)
        tl.store(marks + b * queries + i, mark, mask=here & (h == 0))
    _store(outputs + b * queries * HEADS * WIDTH, mixed, i, queries, HEADS, h, WIDTH, BLOCK_WIDTH)
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
    damage,
    key_damage,
    outputs,
    logs,
    grad,
    grad_query,
    dots,
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
    ISOLATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, b, h = tl.program_id(1), (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    g = h // (HEADS // GROUPS)
    row = b * queries * HEADS * WIDTH
    key += b * keys * GROUPS * WIDTH
    value += b * keys * GROUPS * WIDTH
    i = block * ROWS + tl.arange(0, ROWS)
    here = i < queries
    kept = here
    if ISOLATE:
        mark = tl.load(damage + b * queries + i, mask=here, other=0.0)
        kept = here & (mark == 0.0)
    q = _tile(query + row, i, kept, HEADS, h, WIDTH, BLOCK_WIDTH)
    do = _tile(grad + row, i, kept, HEADS, h, WIDTH, BLOCK_WIDTH)
    o = _tile(outputs + row, i, kept, HEADS, h, WIDTH, BLOCK_WIDTH)
    dot = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(dots + (b * HEADS + h) * queries + i, dot, mask=here)
    log = tl.load(logs + (b * HEADS + h) * queries + i, mask=here, other=0.0)[:, None]
    position = tl.load(positions + b * queries + i, mask=here, other=0)[:, None]
    document = tl.load(documents + b * queries + i, mask=here, other=-2147483647)[:, None]
    total = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    places += (b * blocks + block) * listed
    for n in range(0, tl.load(counts + b * blocks + block)):
        j = tl.load(places + n) * COLUMNS + tl.arange(0, COLUMNS)
        there = j < keys
        key_position = tl.load(key_positions + b * keys + j, mask=there, other=0)[None, :]
        key_document = tl.load(key_documents + b * keys + j, mask=there, other=-2147483648)[None, :]
        sink = tl.load(sinks + b * keys + j, mask=there, other=0)[None, :] if SINKS else 0
        seen = _seen(position, document, key_position, key_document, sink, CAUSAL, WINDOW, SINKS)
        if ISOLATE:
            there = there & (tl.load(key_damage + b * keys + j, mask=there, other=0.0) == 0.0)
        k = _tile(key, j, there, GROUPS, g, WIDTH, BLOCK_WIDTH)
        v = _tile(value, j, there, GROUPS, g, WIDTH, BLOCK_WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
        weights = tl.where(seen, tl.exp2(scores - log), 0.0)
        of_scores = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - dot[:, None])
        total = tl.dot(of_scores.to(k.dtype), k, total, input_precision=PRECISION)
    total = total * scale
    if ISOLATE:
        total = tl.where((mark > 0.0)[:, None], float("nan"), total)
    _store(grad_query + row, total, i, queries, HEADS, h, WIDTH, BLOCK_WIDTH)


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
    damage,
    key_damage,
    logs,
    grad,
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
    ISOLATE: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    block, b, part = tl.program_id(1), (tl.program_id(0) // (GROUPS * PARTS)).to(tl.int64), tl.program_id(0)
    part = part % (GROUPS * PARTS)
    g = part // PARTS
    query += b * queries * HEADS * WIDTH
    grad += b * queries * HEADS * WIDTH
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    there = j < keys
    kept = there
    if ISOLATE:
        key_mark = tl.load(key_damage + b * keys + j, mask=there, other=0.0)
        kept = there & (key_mark == 0.0)
        hit = tl.zeros([COLUMNS], tl.float32)
    k = _tile(key + b * keys * GROUPS * WIDTH, j, kept, GROUPS, g, WIDTH, BLOCK_WIDTH)
    v = _tile(value + b * keys * GROUPS * WIDTH, j, kept, GROUPS, g, WIDTH, BLOCK_WIDTH)
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
        if ISOLATE:
            mark = tl.load(damage + b * queries + i, mask=here, other=0.0)
            hit = tl.maximum(hit, tl.max(tl.where(seen, mark[None, :], 0.0), 1))
            here = here & (mark == 0.0)
        for r in range(HEADS // GROUPS // PARTS):
            h = part * (HEADS // GROUPS // PARTS) + r
            q = _tile(query, i, here, HEADS, h, WIDTH, BLOCK_WIDTH)
            do = _tile(grad, i, here, HEADS, h, WIDTH, BLOCK_WIDTH)
            log = tl.load(logs + (b * HEADS + h) * queries + i, mask=here, other=0.0)[None, :]
            dot = tl.load(dots + (b * HEADS + h) * queries + i, mask=here, other=0.0)[None, :]
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2_E)
            weights = tl.where(seen & here[None, :], tl.exp2(scores - log), 0.0)
            of_value = tl.dot(weights.to(do.dtype), do, of_value, input_precision=PRECISION)
            of_scores = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - dot)
            of_key = tl.dot(of_scores.to(q.dtype), q, of_key, input_precision=PRECISION)
    of_key = of_key * scale
    if ISOLATE:
        # 1 marks a damaged key, 2 a damaged value, 3 both.
        only_value, only_key = key_mark == 2.0, key_mark == 1.0
        of_key = tl.where(((hit > 0.0) | (key_mark > 0.0) & (only_value == 0))[:, None], float("nan"), of_key)
        of_value = tl.where(((hit > 0.0) | (key_mark > 0.0) & (only_key == 0))[:, None], float("nan"), of_value)
    length = b * keys * GROUPS * PARTS * WIDTH
    _store(grad_key + length, of_key, j, keys, GROUPS * PARTS, part, WIDTH, BLOCK_WIDTH)
    _store(grad_value + length, of_value, j, keys, GROUPS * PARTS, part, WIDTH, BLOCK_WIDTH)

"""Attention in blocks of queries and keys with a running maximum: time per visible block, memory linear in tokens.

A block of queries reads the blocks of keys that one of its queries may see. The backward pass recomputes the weights
from the logarithm of their sum, as FlashAttention does (Dao et al. 2022, algorithms 1 and 4).
"""

import functools
from typing import NamedTuple

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba.ops.attention import _visibility
from keras_jamba.ops.attention._visibility import Rule, Tokens
from keras_jamba.ops.attention.fused import FEW_PAIRS, ONCE

_LOW = -1e30  # below all scores; a difference of two is finite
# Tokens per block of queries, of keys, and of keys for a few queries.
_QUERIES, _KEYS, _KEYS_OF_FEW = 256, 256, 1024
# Steps of generation read long caches in blocks, unless each block launches operations.
_FEW_QUERIES, _LONG_CACHE = 16, 2048 if _backend.compilation.has_jit() else float("inf")


def why_not(call):
    if None in (call.queries, call.keys):
        return "the number of tokens is unknown while the graph is traced"
    if call.batch == 0:
        return "there are no rows"
    if not _backend.autodiff.can_trace_custom_gradient():
        return "the tracer does not support custom gradients"
    long_cache = call.queries <= _FEW_QUERIES and call.keys > _LONG_CACHE
    if not (call.requested or long_cache or call.exceeds(FEW_PAIRS)):
        return f"{call.queries} x {call.keys} pairs are too few"
    return None


def run(query, key, value, rule, of_query, of_key):
    length = query.shape[1]
    blocks, (of_query, of_key), (added, added_keys) = _prepared(rule, of_query, of_key)
    query, key, value = _padded(query, added), _padded(key, added_keys), _padded(value, added_keys)
    return _attention(blocks)(query, key, value, *_present(of_query, of_key))[:, :length]


def reach(rule, of_query, of_key):
    """Returns the last two arguments of `isolated`."""
    blocks, tokens, _ = _prepared(rule, of_query, of_key)
    return Reach(blocks, of_query[0].shape[1], of_key[0].shape[1]), _present(*tokens)


def _prepared(rule, of_query, of_key):
    """Returns `(blocks, tokens, (added, added_keys))`: the `Tokens` after as many that complete the last blocks."""
    t, s = of_query.positions.shape[1], of_key.positions.shape[1]
    keys = _KEYS if t > _FEW_QUERIES else _KEYS_OF_FEW
    blocks = Blocks(rule, min(_QUERIES, _rounded(t)), min(keys, _rounded(s)), of_key.sinks is not None)
    added = -t % blocks.query_size, -s % blocks.key_size
    tokens = _visibility.padded(of_query, added[0], is_key=False), _visibility.padded(of_key, added[1], is_key=True)
    return blocks, tokens, added


def _present(of_query, of_key):
    return [x for x in (*of_query, *of_key) if x is not None]


def _rounded(count):
    """Returns the block size for `count` tokens, few of which are missing: a power of two, 1 for a single token."""
    return 1 << (count - 1).bit_length()


def _padded(x, count):
    return ops.pad(x, [(0, 0), (0, count), (0, 0), (0, 0)]) if count else x


@functools.cache
def _attention(blocks):
    """Returns the differentiable function of query, key, value and the tensors of their `Tokens`."""
    return _backend.autodiff.custom_gradient(blocks.forward, blocks.backward, once=ONCE)


class Blocks(NamedTuple):
    """Forward and backward pass for one rule and one pair of block sizes. The sizes divide the numbers of tokens."""

    rule: Rule
    query_size: int
    key_size: int
    has_sinks: bool

    def tokens_of(self, tokens):
        """Returns the `Tokens` of queries and keys from the list of their tensors."""
        positions, documents, *of_key = tokens
        return Tokens(positions, documents), Tokens(*of_key)

    def forward(self, query, key, value, *tokens):
        of_query, of_key = self.tokens_of(tokens)
        keys, values = map(self.layout, (key, value))
        heads = query.shape[2] // key.shape[2]
        scale = query.shape[3] ** -0.5

        def attend(carry, block):
            queries, at, places, count = block
            zeros = ops.zeros_like(queries)

            def add(n, top, total, mixed):
                k, v, seen = self.key_block(places[n], keys, values, at, of_key, heads)
                scores = ops.where(seen, ops.matmul(queries, k) * scale, _LOW)
                new = ops.maximum(top, ops.max(scores, axis=-1, keepdims=True))
                weights = ops.where(seen, ops.exp(scores - new), 0.0)
                kept = ops.exp(top - new)
                total = total * kept + ops.sum(weights, axis=-1, keepdims=True)
                return n + 1, new, total, mixed * kept + ops.matmul(weights, v)

            none = zeros[..., :1]
            _, top, total, mixed = ops.while_loop(
                lambda n, *_: n < count, add, (ops.zeros((), "int32"), none + _LOW, none, zeros)
            )
            total = ops.maximum(total, 1e-30)
            return carry, (mixed / total, (top + ops.log(total))[..., 0])

        blocks = self.query_blocks(query, key.shape[2]), self.split(of_query), *self.lists(of_query, of_key)
        _, (mixed, logs) = _backend.compilation.scan(attend, ops.zeros((), "int32"), blocks)
        outputs = ops.cast(self.in_rows(mixed, query), query.dtype)
        return outputs, (query, key, value, tokens, outputs, logs)

    def backward(self, residuals, gradient):
        query, key, value, tokens, outputs, logs = residuals
        of_query, of_key = self.tokens_of(tokens)
        keys, values = map(self.layout, (key, value))
        groups, heads, scale = key.shape[2], query.shape[2] // key.shape[2], query.shape[3] ** -0.5

        def attend(totals, block):
            queries, grads, outputs, logs, at, places, count = block
            dot = ops.sum(grads * outputs, axis=-1, keepdims=True)

            def add(n, grad_query, grad_keys, grad_values):
                place = places[n]
                k, v, seen = self.key_block(place, keys, values, at, of_key, heads)
                weights = ops.where(seen, ops.exp(ops.matmul(queries, k) * scale - logs[..., None]), 0.0)
                through = ops.matmul(grads, ops.swapaxes(v, 2, 3)) - dot
                of_scores = weights * through * scale
                grad_query = grad_query + ops.matmul(of_scores, ops.swapaxes(k, 2, 3))
                grad_keys = _backend.tensors.add_to_block(
                    grad_keys, ops.matmul(ops.swapaxes(of_scores, 2, 3), queries), place, axis=2
                )
                grad_values = _backend.tensors.add_to_block(
                    grad_values, ops.matmul(ops.swapaxes(weights, 2, 3), grads), place, axis=2
                )
                return n + 1, grad_query, grad_keys, grad_values

            _, grad_query, *totals = ops.while_loop(
                lambda n, *_: n < count, add, (ops.zeros((), "int32"), ops.zeros_like(queries), *totals)
            )
            return tuple(totals), grad_query

        blocks = *(self.query_blocks(x, groups) for x in (query, gradient, outputs)), logs, self.split(of_query)
        blocks = *blocks, *self.lists(of_query, of_key)
        batch, length, _, width = ops.shape(key)
        zeros = ops.zeros((batch, groups, length, width), _compute_dtype(key))
        (grad_key, grad_value), grad_query = _backend.compilation.scan(attend, (zeros, zeros + 0), blocks)
        grads = self.in_rows(grad_query, query), _by_token(grad_key), _by_token(grad_value)
        grads = [ops.cast(x, like.dtype) for x, like in zip(grads, (query, key, value), strict=True)]
        return *grads, *(None for _ in tokens)

    @property
    def few(self):
        """Whether keys are read once or a few times, so that transposing all of them first would cost more."""
        return self.query_size <= _FEW_QUERIES

    def layout(self, x):
        """Returns keys or values `(b, s, g, c)` in the layout of the loop over blocks: `(b, g, s, c)` unless few."""
        return x if self.few else _by_head(x)

    def key_block(self, place, keys, values, at, of_key, heads):
        """Returns a block of keys `(b, g, c, j)` and values `(b, g, j, c)`, and `(b, 1, heads * i, j)` bool."""
        block = lambda x, axis=1: _backend.tensors.block(x, place, self.key_size, axis)  # noqa: E731
        k, v = (_by_head(block(x)) if self.few else block(x, axis=2) for x in (keys, values))
        of_block = [None if x is None else block(x) for x in of_key]
        seen = _visibility.visible(self.rule, Tokens(*at), Tokens(*of_block))
        dtype = _compute_dtype(k)
        return ops.swapaxes(ops.cast(k, dtype), 2, 3), ops.cast(v, dtype), ops.tile(seen, (1, heads, 1))[:, None]

    def query_blocks(self, x, groups):
        """Returns `x (b, t, h, c)` as `(blocks, b, g, heads * query_size, c)`."""
        b, t, h, c = x.shape
        x = ops.reshape(x, (-1, t // self.query_size, self.query_size, groups, h // groups, c))
        x = ops.cast(ops.transpose(x, (1, 0, 3, 4, 2, 5)), _compute_dtype(x))
        return ops.reshape(x, (t // self.query_size, -1, groups, h // groups * self.query_size, c))

    def in_rows(self, x, like):
        """Reverses `query_blocks`, to the shape of `like` `(b, t, h, c)`."""
        b, t, h, c = like.shape
        blocks, _, groups = x.shape[:3]
        x = ops.reshape(x, (blocks, -1, groups, h // groups, self.query_size, c))
        return ops.reshape(ops.transpose(x, (1, 0, 4, 2, 3, 5)), (-1, t, h, c))

    def split(self, of_query):
        """Returns positions and documents of the queries by block: `(blocks, b, query_size)` each."""
        split = lambda x: ops.reshape(x, (-1, x.shape[1] // self.query_size, self.query_size))  # noqa: E731
        return tuple(ops.transpose(split(x), (1, 0, 2)) for x in of_query[:2])

    def lists(self, of_query, of_key):
        """Returns the blocks of keys of each block of queries, and their number. All rows share the loop."""
        overlap = _visibility.block_overlap(self.rule, of_query, of_key, self.query_size, self.key_size)
        return _visibility.block_lists(ops.any(overlap, axis=0))


def _compute_dtype(x):
    return keras.backend.result_type(x.dtype, "float32")


def _by_head(x):
    """Returns `x (b, s, g, c)` as `(b, g, s, c)`."""
    return ops.transpose(x, (0, 2, 1, 3))


_by_token = _by_head


class Reach(NamedTuple):
    """Which queries see marked keys, and which keys marked queries see, for `isolated`. Without marks it costs nothing.

    `queries` and `keys` are the numbers of tokens without those that complete the last blocks.
    """

    blocks: Blocks
    queries: int
    keys: int

    @property
    def has_loops(self):
        return True

    def to_queries(self, of_key, tokens):
        of_key = _marks(of_key, tokens[2])

        def block(carry, queries):
            at, places, count = queries
            sees = ops.zeros(ops.shape(at[0]), "float32")

            def add(n, sees):
                seen = self._seen(places[n], at, tokens)
                marks = _backend.tensors.block(of_key, places[n], self.blocks.key_size, axis=1)[:, None]
                return n + 1, ops.maximum(sees, ops.max(ops.where(seen, marks, 0.0), axis=2))

            return carry, ops.while_loop(lambda n, _: n < count, add, (ops.zeros((), "int32"), sees))[1]

        _, found = _backend.compilation.scan(block, ops.zeros((), "int32"), self._blocks(tokens, of_key))
        return ops.reshape(ops.transpose(found, (1, 0, 2)), (-1, tokens[0].shape[1]))[:, : self.queries] > 0

    def to_keys(self, of_query, tokens):
        of_query = _marks(of_query, tokens[0])
        marks = self.blocks.split((of_query, of_query))[0]

        def block(total, queries):
            marks, (at, places, count) = queries

            def add(n, total):
                seen = self._seen(places[n], at, tokens)
                update = ops.max(ops.where(seen, marks[:, :, None], 0.0), axis=1)
                return n + 1, _backend.tensors.add_to_block(total, update, places[n], axis=1)

            return ops.while_loop(lambda n, _: n < count, add, (ops.zeros((), "int32"), total))[1], count

        blocks = marks, self._blocks(tokens, of_query)
        total, _ = _backend.compilation.scan(block, ops.zeros(ops.shape(tokens[2]), "float32"), blocks)
        return total[:, : self.keys] > 0

    def _blocks(self, tokens, marks):
        of_query, of_key = self.blocks.tokens_of(tokens)
        places, count = self.blocks.lists(of_query, of_key)
        return self.blocks.split(of_query), places, ops.where(ops.any(marks > 0), count, 0)

    def _seen(self, place, at, tokens):
        of_key = [_backend.tensors.block(x, place, self.blocks.key_size, axis=1) for x in tokens[2:]]
        return _visibility.visible(self.blocks.rule, Tokens(*at), Tokens(*of_key))


def _marks(x, like):
    """Returns bool marks `(b, t)` as float32, with zeros for the tokens that complete the last block of `like`."""
    return ops.pad(ops.cast(x, "float32"), [(0, 0), (0, like.shape[1] - x.shape[1])])

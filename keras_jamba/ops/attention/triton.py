"""Attention in Triton, on a GPU: memory linear in tokens, and time per visible block."""

import functools

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._triton import attention as kernels
from keras_jamba.ops.attention import _visibility, blocks
from keras_jamba.ops.attention._visibility import Tokens
from keras_jamba.ops.attention.fused import ONCE

_launcher = _backend.kernels.triton_launcher
# Memory linear in tokens here too. Its loops end at once unless a token is damaged.
reach = blocks.reach
# A program would be mostly empty with fewer queries.
_FEW_QUERIES = 16


def why_not(call):
    if call.platform != "gpu":
        return "it requires a GPU"
    if reason := _backend.kernels.why_no_triton():
        return reason
    if None in (call.batch, call.queries, call.keys) or call.batch == 0:
        return "it requires static shapes and at least one row"
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return f"it supports bfloat16, float16 and float32, not {call.dtype}"
    if call.width > kernels.WIDEST:
        return f"it supports heads of at most {kernels.WIDEST} channels"
    if call.queries < _FEW_QUERIES and not call.requested:
        return f"{call.queries} queries are too few"
    return None


def run(query, key, value, rule, of_query, of_key):
    attend = _attention(rule, of_key.sinks is not None)
    tokens = [x for x in (*of_query, *of_key) if x is not None]
    return attend(query, key, value, *tokens)


@functools.cache
def _attention(rule, has_sinks):
    """Returns the differentiable function of query, key, value and the tensors of their `Tokens`."""
    options = kernels.Options(rule.causal, rule.window or 0, has_sinks)

    def prepared(query, key, value, tokens):
        positions, documents, *of_key = tokens
        sinks = of_key[2] if has_sinks else of_key[1]
        return kernels.Given(query, key, value, positions, documents, *of_key[:2], sinks), Tokens(*of_key)

    def lists(given, of_key, tile, of_keys=False):
        of_query = Tokens(given.positions, given.documents)
        missing = -given.query.shape[1] % tile.rows, -given.key.shape[1] % tile.columns
        of_query = _visibility.padded(of_query, missing[0], is_key=False)
        of_key = _visibility.padded(of_key, missing[1], is_key=True)
        overlap = _visibility.block_overlap(rule, of_query, of_key, tile.rows, tile.columns)
        of_both = (overlap, ops.transpose(overlap, (0, 2, 1))) if of_keys else (overlap,)
        return [kernels.Lists(*_visibility.block_lists(x)) for x in of_both]

    def forward(query, key, value, *tokens):
        given, of_key = prepared(query, key, value, tokens)
        tile, _ = _tiles(query)
        (of_rows,) = lists(given, of_key, tile)
        outputs, logs = kernels.forward(_launcher(), given, of_rows, options, tile)
        return outputs, (query, key, value, tokens, outputs, logs)

    def backward(residuals, gradient):
        query, key, value, tokens, outputs, logs = residuals
        given, of_key = prepared(query, key, value, tokens)
        _, tile = _tiles(query)
        gradient = ops.cast(gradient, query.dtype)
        dots = ops.sum(ops.cast(gradient, "float32") * ops.cast(outputs, "float32"), axis=3)
        of_both = lists(given, of_key, tile, of_keys=True)
        found = kernels.gradients(
            _launcher(), given, *of_both, gradient, logs, ops.transpose(dots, (0, 2, 1)), options, tile
        )
        return *found, *(None for _ in tokens)

    return _backend.autodiff.custom_gradient(forward, backward, has_loops=False, once=ONCE)


def _tiles(query):
    return kernels.tiles(query.shape[3], keras.backend.standardize_dtype(query.dtype))

"""Attention in Triton, on a GPU: memory linear in tokens, and time per visible block."""

import functools

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._triton import attention as kernels
from keras_jamba.ops._isolation import largest
from keras_jamba.ops.attention import _visibility
from keras_jamba.ops.attention._visibility import Tokens
from keras_jamba.ops.attention.fused import ONCE

_launcher = _backend.kernels.triton_launcher
# A program would be mostly empty with fewer queries.
FEW_QUERIES = 16


def why_not(call):
    if call.platform != "gpu":
        return "it requires a GPU"
    if reason := _backend.kernels.why_no_triton():
        return reason
    if not _backend.autodiff.can_trace_custom_gradient():
        return "the tracer does not support custom gradients"
    if None in (call.batch, call.queries, call.keys) or call.batch == 0:
        return "it requires static shapes and at least one row"
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return f"it supports bfloat16, float16 and float32, not {call.dtype}"
    if call.width > kernels.WIDEST:
        return f"it supports heads of at most {kernels.WIDEST} channels"
    if call.queries < FEW_QUERIES and not call.requested:
        return f"{call.queries} queries are too few"
    return None


def run(query, key, value, rule, of_query, of_key, isolate=False):
    attend = _attention(rule, of_key.sinks is not None, isolate)
    tokens = [x for x in (*of_query, *of_key) if x is not None]
    return attend(query, key, value, *tokens)


@functools.cache
def _attention(rule, has_sinks, isolate):
    """Returns the differentiable function of query, key, value and the tensors of their `Tokens`."""
    options = kernels.Options(rule.causal, rule.window or 0, has_sinks, isolate)

    def prepared(query, key, value, tokens):
        positions, documents, *of_key = tokens
        sinks = of_key[2] if has_sinks else of_key[1]
        return kernels.Given(query, key, value, positions, documents, *of_key[:2], sinks)

    def overlap(given):
        """Returns `(b, query blocks, key blocks)` bool."""
        tile = kernels.tile(given.query.shape[3], keras.backend.standardize_dtype(given.query.dtype))
        of_query = Tokens(given.positions, given.documents)
        of_key = Tokens(given.key_positions, given.key_documents, given.sinks if has_sinks else None)
        missing = -given.query.shape[1] % tile.rows, -given.key.shape[1] % tile.columns
        of_query = _visibility.padded(of_query, missing[0], is_key=False)
        of_key = _visibility.padded(of_key, missing[1], is_key=True)
        return _visibility.block_overlap(rule, of_query, of_key, tile.rows, tile.columns)

    def damage(x):
        return kernels.damage(_launcher(), x, largest(x.shape[3]))

    def forward(query, key, value, *tokens):
        given = prepared(query, key, value, tokens)
        blocks = overlap(given)
        damaged = kernels.Damage(given.positions, given.key_positions)  # not read
        if isolate:
            damaged = kernels.Damage(damage(query), damage(key) + 2 * damage(value))
        lists = kernels.Lists(*_visibility.block_lists(blocks))
        outputs, logs, marks = kernels.forward(_launcher(), given, lists, damaged, options)
        return outputs, (query, key, value, tokens, blocks, lists, damaged, outputs, logs, marks)

    def backward(residuals, gradient):
        query, key, value, tokens, blocks, lists, damaged, outputs, logs, marks = residuals
        gradient = ops.cast(gradient, query.dtype)
        if isolate:
            damaged = kernels.Damage(marks + damage(gradient), damaged[1])
        given = prepared(query, key, value, tokens)
        key_lists = kernels.Lists(*_visibility.block_lists(ops.transpose(blocks, (0, 2, 1))))
        of_query, *of_keys = kernels.gradients(
            _launcher(), given, lists, key_lists, damaged, outputs, logs, gradient, options
        )
        return of_query, *(_summed(x, key) for x in of_keys), *(None for _ in tokens)

    return _backend.autodiff.custom_gradient(forward, backward, has_loops=False, once=ONCE)


def _summed(x, key):
    """Returns `x (b, s, g * p, c)` summed over the p parts of each head, in the shape and dtype of `key`."""
    if x.shape[2] == key.shape[2]:
        return x
    return ops.cast(ops.sum(ops.reshape(x, (*key.shape[:3], -1, key.shape[3])), axis=3), key.dtype)

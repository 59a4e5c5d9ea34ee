"""Speed of attention over packed documents on a GPU, beside plain causal attention of as many tokens.

    KERAS_BACKEND=torch python -m benchmarks.attention.gpu

KERAS_BACKEND is jax or torch. The peer is the backend's own attention: without a mask for one document (`fused`), with
a mask for several (`dense`). The script first compares outputs and gradients with float32 `dense`. It then times
forward and gradient in one interleaved run per shape, in bfloat16. "device ms" is the sum of all kernels: a training
step in a CUDA graph, or compiled by XLA, takes no more. It also times one new token after caches of 1 K to 64 K tokens.
There the peers are `dense`, and the sums of keys and values, which read as many bytes. Prints the rows and writes
results/attention_gpu_BACKEND.json.
"""

import argparse
import functools

import keras
import numpy as np
from keras import ops

from benchmarks import measure
from benchmarks.device_time import busy_milliseconds
from keras_jamba.ops import grouped_query_attention

BACKEND = keras.backend.backend()
# Rows, tokens, heads, key-value heads and width of a head.
SHAPES = ((4, 4096, 16, 4, 64), (2, 4096, 20, 1, 128), (1, 32768, 16, 4, 64))
DOCUMENTS = (128, 512, 2048)
# `dense` refuses longer rows.
LONGEST_OF_ALL_PAIRS = 8192
# Rows, heads, key-value heads and width of a head of a new token, and the tokens in its cache.
TOKEN_SHAPES, CACHES = ((1, 16, 4, 64), (1, 20, 1, 128), (8, 16, 4, 64)), (1024, 8192, 65536)
STEPS = 10


def tensors_of(shape, dtype="bfloat16", seed=0):
    batch, tokens, heads, groups, width = shape
    rng = np.random.default_rng(seed)
    normal = lambda n: rng.standard_normal((batch, tokens, n, width)).astype("float32")  # noqa: E731
    return [ops.cast(ops.convert_to_tensor(normal(n)), dtype) for n in (heads, groups, groups, heads)]


def attention(implementation, shape, document=None, window=None):
    """Returns causal attention as a function of query, key and value; `document` in tokens, None for one document."""
    ids = None
    if document is not None:
        ids = ops.convert_to_tensor(np.repeat((np.arange(shape[1]) // document)[None], shape[0], 0).astype("int32"))

    def run(query, key, value):
        options = dict(segment_ids=ids, window=window, implementation=implementation)
        return grouped_query_attention(query, key, value, True, **options)

    return run


def contestants(shape):
    """Returns `{(implementation, document, window): function}`."""
    found = [("fused", None, None), ("triton", None, None), ("triton", None, 512)]
    found += [("triton", document, None) for document in DOCUMENTS]
    if shape[1] <= LONGEST_OF_ALL_PAIRS:
        found += [("dense", document, None) for document in DOCUMENTS] + [("dense", None, 512)]
    return {key: attention(key[0], shape, *key[1:]) for key in found}


def check():
    """Compares outputs and gradients of the Triton kernels with dense attention in float32."""
    shape = (2, 1000, 8, 2, 64)
    for document, window in ((None, None), (300, None), (300, 100)):
        found = []
        for name, dtype in (("triton", "bfloat16"), ("dense", "float32")):
            tensors = [ops.cast(x, dtype) for x in tensors_of(shape)]
            forward, gradient = measure.forward_and_gradient(attention(name, shape, document, window), tensors)
            found.append([forward(), *gradient()])
        for actual, expected in zip(*found, strict=True):
            actual, expected = (ops.convert_to_numpy(ops.cast(x, "float32")) for x in (actual, expected))
            error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
            # NaN fails as well.
            if not error < 1e-2:
                raise AssertionError(f"Relative error must be below 0.01. Received: {error} for {document}, {window}.")


def new_token(implementation, cache):
    """Returns attention of one token after `cache` tokens, or the sums of keys and values, as a function."""

    def run(query, key, value):
        if implementation == "reading":
            return ops.sum(key) + ops.sum(value)
        return grouped_query_attention(query, key, value, True, offset=cache - 1, implementation=implementation)

    return run


def check_new_token():
    """Compares a new token in bfloat16 with dense attention in float32."""
    query, key, value, _ = tensors_of((2, 5000, 20, 1, 128))
    found = []
    for name, dtype in (("split_keys", "bfloat16"), ("dense", "float32")):
        given = [ops.cast(x, dtype) for x in (query[:, :1], key, value)]
        found.append(ops.convert_to_numpy(ops.cast(new_token(name, 5000)(*given), "float32")))
    error = np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1])
    if not error < 1e-2:
        raise AssertionError(f"Relative error must be below 0.01. Received: {error} for a new token.")


def token_rows(rounds):
    """Yields a row per shape, cache and implementation."""
    for batch, heads, groups, width in TOKEN_SHAPES:
        for cache in CACHES:
            query, *_ = tensors_of((batch, 1, heads, groups, width))
            _, key, value, _ = tensors_of((batch, cache, 1, groups, width))
            names, given = ("split_keys", "dense", "reading"), (query, key, value, query)
            steps = {name: measure.forward_and_gradient(new_token(name, cache), given)[0] for name in names}
            seconds = measure.interleaved(steps, rounds)
            for name, step in steps.items():
                busy, longest = busy_milliseconds(functools.partial(_repeated, step), STEPS)
                yield {
                    "rows": batch,
                    "cache": cache,
                    "heads": heads,
                    "kv_heads": groups,
                    "width": width,
                    "implementation": name,
                    "ms": round(1e3 * seconds[name], 4),
                    "device ms": round(busy, 4),
                    "longest": [[kernel[:60], round(ms, 4)] for kernel, ms, _ in longest[:5]],
                }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    check()
    check_new_token()
    rows = []
    for row in token_rows(args.rounds):
        rows.append(row)
        print(row, flush=True)
    for shape in SHAPES:
        steps = {
            key: measure.forward_and_gradient(function, tensors_of(shape))[1]
            for key, function in contestants(shape).items()
        }
        seconds = measure.interleaved(steps, args.rounds)
        for key, step in steps.items():
            name, document, window = key
            row = dict(zip(("rows", "tokens", "heads", "kv_heads", "width"), shape, strict=True))
            row |= {"implementation": name, "document": document, "window": window, "ms": round(1e3 * seconds[key], 3)}
            busy, longest = busy_milliseconds(functools.partial(_repeated, step), STEPS)
            row |= {
                "device ms": round(busy, 3),
                "longest": [[kernel[:60], round(ms, 3)] for kernel, ms, _ in longest[:5]],
            }
            rows.append(row)
            print(row, flush=True)
    measure.record(f"attention_gpu_{BACKEND}", {"backend": BACKEND, "rows": rows})


def _repeated(step):
    for _ in range(STEPS):
        step()


if __name__ == "__main__":
    main()

"""Time and memory of attention with a window and sinks, up to 131,072 tokens, on a CPU.

    KERAS_BACKEND=jax python -m benchmarks.attention.windows

One row of causal attention in float32: a token sees the last 1,024 tokens and the first 4. The script first compares
outputs and gradients with those of all pairs. It then times forward and gradient per length, and measures the peak
memory in separate processes. Cost per token must not grow with the length. Prints the rows and writes
results/windows_BACKEND.json.
"""

import argparse
import json

import keras
import numpy as np
from keras import ops

from benchmarks import measure
from benchmarks.attention.cpu import GROUPS, HEADS, WIDTH, tensors_of
from keras_jamba.ops import grouped_query_attention

BACKEND = keras.backend.backend()
WINDOW, SINKS = 1024, 4
LENGTHS = (8192, 32768, 131072)


def attention(implementation, window=WINDOW, sinks=SINKS):
    def run(query, key, value):
        options = dict(window=window, sinks=sinks, implementation=implementation)
        return grouped_query_attention(query, key, value, True, **options)

    return run


def check():
    """Compares outputs and gradients with those of dense attention."""
    tensors, found = tensors_of(1024), []
    for name in ("blocks", "dense"):
        forward, gradient = measure.forward_and_gradient(attention(name, 100, SINKS), tensors)
        found.append([forward(), *gradient()])
    for a, e in zip(*found, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(a), ops.convert_to_numpy(e), rtol=1e-3, atol=1e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", help="a length: print only the peak MiB of it")
    args = parser.parse_args()
    if args.memory:
        (length,) = json.loads(args.memory)
        print(measure.extra_memory(measure.forward_and_gradient(attention(None), tensors_of(length))[1]))
        return
    check()
    functions = {length: measure.forward_and_gradient(attention(None), tensors_of(length))[1] for length in LENGTHS}
    seconds, rows = measure.interleaved(functions, args.rounds), []
    for length, value in seconds.items():
        mib = measure.memory_in_a_process(__spec__.name, length)
        each = {"ms": round(1e3 * value, 1), "us per token": round(1e6 * value / length, 2), "MiB": round(mib)}
        rows.append({"tokens": length, **each, "KiB per token": round(1024 * mib / length, 2)})
        print(rows[-1], flush=True)
    shape = {"heads": HEADS, "kv_heads": GROUPS, "width": WIDTH, "window": WINDOW, "sinks": SINKS}
    measure.record(f"windows_{BACKEND}", {"backend": BACKEND, **shape, "rows": rows})


if __name__ == "__main__":
    main()

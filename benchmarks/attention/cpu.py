"""Speed and memory of attention over packed documents on a CPU, beside plain causal attention of as many tokens.

    KERAS_BACKEND=jax python -m benchmarks.attention.cpu

KERAS_BACKEND names the backend. The peer is the backend's own attention, `keras.ops.dot_product_attention`: without a
mask for one document (`fused`), with a mask for several (`dense`). The script first compares outputs and gradients. It
then times forward and gradient in one interleaved run per row length, and measures the peak memory in separate
processes. Prints the rows and writes results/attention_BACKEND.json.
"""

import argparse
import json

import keras
import numpy as np
from keras import ops

from benchmarks import measure
from keras_jamba.ops import grouped_query_attention

BACKEND = keras.backend.backend()
HEADS, GROUPS, WIDTH = 8, 2, 64
LENGTHS, DOCUMENTS = (4096, 16384), (128, 512, 2048)
# The scores of all pairs of 16,384 tokens take 8.6 GB, on backends that store them.
LONGEST_OF_ALL_PAIRS = 4096


def tensors_of(length):
    rng = np.random.default_rng(0)
    shapes = [(1, length, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [ops.convert_to_tensor(rng.standard_normal(shape).astype("float32")) for shape in shapes]


def attention(implementation, length, document):
    """Returns causal attention as a function of query, key and value; `document` in tokens, None for one document."""
    ids = None if document is None else (np.arange(length) // document)[None].astype("int32")

    def run(query, key, value):
        return grouped_query_attention(query, key, value, True, segment_ids=ids, implementation=implementation)

    return run


def contestants(length):
    """Returns `{(implementation, document): function}`."""
    found = {("blocks", document): attention("blocks", length, document) for document in (None, *DOCUMENTS)}
    if length <= LONGEST_OF_ALL_PAIRS:
        found[("fused", None)] = attention("fused", length, None)
        found |= {("dense", document): attention("dense", length, document) for document in DOCUMENTS}
    return found


def check():
    """Compares outputs and gradients in blocks with those of the backend's own attention."""
    tensors = tensors_of(1024)
    for document in (None, 128):
        found = []
        for name in ("blocks", "fused" if document is None else "dense"):
            forward, gradient = measure.forward_and_gradient(attention(name, 1024, document), tensors)
            found.append([forward(), *gradient()])
        for a, e in zip(*found, strict=True):
            np.testing.assert_allclose(ops.convert_to_numpy(a), ops.convert_to_numpy(e), rtol=1e-3, atol=1e-4)


def peak(implementation, length, document):
    function = attention(implementation, length, document)
    return measure.extra_memory(measure.forward_and_gradient(function, tensors_of(length))[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help="JSON [implementation, length, document]: print only the peak MiB of it")
    args = parser.parse_args()
    if args.memory:
        print(peak(*json.loads(args.memory)))
        return
    check()
    rows = []
    for length in LENGTHS:
        functions = contestants(length)
        steps = {key: measure.forward_and_gradient(f, tensors_of(length))[1] for key, f in functions.items()}
        seconds = measure.interleaved(steps, args.rounds)
        for (name, document), value in seconds.items():
            mib = measure.memory_in_a_process(__spec__.name, name, length, document)
            rows.append(
                {
                    "length": length,
                    "document": document,
                    "implementation": name,
                    "ms": round(1e3 * value, 1),
                    "MiB": round(mib),
                }
            )
            print(rows[-1], flush=True)
    shape = {"heads": HEADS, "kv_heads": GROUPS, "width": WIDTH, "batch": 1}
    measure.record(f"attention_{BACKEND}", {"backend": BACKEND, **shape, "rows": rows})


if __name__ == "__main__":
    main()

"""Speed of a mixture of experts on a CPU, with keras-hub and Hugging Face as peers.

    pip install keras-hub transformers torch
    KERAS_BACKEND=jax python -m benchmarks.moe.cpu

The workload is router, experts and weighted sum, forward and backward: SwiGLU, d 256, hidden 1024, two experts per
token. The script first compares outputs and gradients of every contestant with the dense form, which computes every
expert on every token. It then times all in one interleaved run. keras-hub computes every expert on every token. Hugging
Face's loop over the experts runs on PyTorch on every backend. Prints a table and writes results/moe_BACKEND.json.
"""

import argparse
import sys

import keras
import numpy as np
from keras import ops

from benchmarks import measure
from benchmarks.moe.cpu_peers import HuggingFace, keras_hub_block
from keras_jamba.ops import expert_mlp, top_k_routing
from keras_jamba.ops.experts import _TABLE, _Call

BACKEND = keras.backend.backend()
D, HIDDEN, PER_TOKEN = 256, 1024, 2
# Cases of one list are compared with each other and therefore timed in one run.
RUNS = [[(512, 8)], [(2048, 8)], [(4096, 8), (4096, 64)]]
CAPACITY = 1.25


def ours(implementation=None, normalize=True, **options):
    """Returns router and experts as a function of `(tokens, router, up_bank, down_bank, gate_bank)`."""

    def mixture(tokens, router, *banks):
        weights, indices, _ = top_k_routing(ops.matmul(tokens, router), PER_TOKEN, normalize)
        y = expert_mlp(tokens, weights, indices, *banks, implementation=implementation, **options)
        return y[0] if options else y

    return mixture


def dropless(experts):
    """Returns the name of the dropless form that `expert_mlp` chooses here."""
    call = _Call(experts, PER_TOKEN)
    return next(name for name, form in _TABLE.items() if form.why_not(call) is None)


def random_arrays(tokens, experts, d=D, hidden=HIDDEN):
    """Returns tokens, router, banks, and a weight for the output, as NumPy arrays."""
    rng = np.random.default_rng(0)
    shapes = [(tokens, d), (d, experts), (experts, d, hidden), (experts, hidden, d), (experts, d, hidden), (tokens, d)]
    return [rng.standard_normal(s).astype("float32") / s[-2] ** (len(s) > 2 and 0.5) for s in shapes]


def contestants(experts, arrays):
    """Returns `{name: (forward, forward and gradient)}`."""
    tensors = [ops.convert_to_tensor(x) for x in arrays]
    functions = {dropless(experts): ours(), f"capacity {CAPACITY}": ours(capacity_factor=CAPACITY)}
    if experts <= 8:
        functions["keras-hub"] = keras_hub_block(experts, PER_TOKEN, *arrays[2].shape[1:])
    pairs = {name: measure.forward_and_gradient(function, tensors) for name, function in functions.items()}
    return pairs | {"Hugging Face": HuggingFace(arrays, PER_TOKEN).forward_and_gradient()}


def check():
    """Checks outputs and gradients of every contestant against the dense form."""
    arrays = random_arrays(96, 8, 16, 32)
    tensors = [ops.convert_to_tensor(x) for x in arrays]
    for name, pair in contestants(8, arrays).items():
        # A capacity drops tokens and is a different function. Tests compare it with its own definition.
        if name.startswith("capacity"):
            continue
        dense = measure.forward_and_gradient(ours("dense", normalize=name != "Hugging Face"), tensors)
        results = [[_numpy(x) for x in (f(), *g())] for f, g in (pair, dense)]
        for actual, expected in zip(*results, strict=True):
            tolerance = 2e-5 * max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=1e-4, err_msg=name)


def _numpy(x):
    return x.detach().numpy() if hasattr(x, "detach") else ops.convert_to_numpy(x)


def timings(rounds):
    results = []
    for cases in RUNS:
        functions = {}
        for tokens, experts in cases:
            pairs = contestants(experts, random_arrays(tokens, experts))
            functions |= {(tokens, experts, name): pair[1] for name, pair in pairs.items()}
        seconds = measure.interleaved(functions, rounds)
        for tokens, experts in cases:
            ms = {key[2]: round(1e3 * value, 1) for key, value in seconds.items() if key[:2] == (tokens, experts)}
            results.append({"tokens": tokens, "experts": experts, "ms": ms})
            print(results[-1], file=sys.stderr, flush=True)
    return results


def show(results):
    rows, columns = [], ["tokens", "experts"]
    for row in results:
        best = row["ms"][dropless(row["experts"])]
        ratios = {name: f"{ms / best:.2f}x" for name, ms in row["ms"].items()}
        rows.append(row | ratios | {dropless(row["experts"]): f"{best} ms"})
        columns += [name for name in row["ms"] if name not in columns]
    print(measure.table(rows, columns))
    few, many = (r["ms"][dropless(r["experts"])] for r in results[-2:])
    print(f"At 4,096 tokens, 64 experts take {many / few:.2f} times as long as 8.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    check()
    results = timings(args.rounds)
    show(results)
    measure.record(f"moe_{BACKEND}", {"backend": BACKEND, "d": D, "hidden": HIDDEN, "timings": results})


if __name__ == "__main__":
    main()

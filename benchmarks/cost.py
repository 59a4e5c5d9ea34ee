"""Time and memory of layers and backbones by number of tokens, forward and backward, on a CPU.

    KERAS_BACKEND=torch python -m benchmarks.cost

Compares a Mamba layer, an attention layer, a mixture of experts, `JambaBackbone`, and a backbone of attention alone
with the same number of layers and parameters. Times are from interleaved runs, peaks from one process each. Prints
tables, the slopes, and the number of tokens where the hybrid overtakes attention. Writes results/cost_BACKEND.json and
results/cost_BACKEND.png.
"""

import argparse
import json
import math
import sys

import keras
import numpy as np

from benchmarks import measure
from keras_jamba import JambaBackbone
from keras_jamba.layers import AttentionLayer, MambaLayer, MoELayer

BACKEND = keras.backend.backend()
D = 64
# On a CPU, JAX and TensorFlow store the scores of all token pairs in every layer: 8,192 tokens exceed the memory.
LENGTHS = [1024, 2048, 4096, 8192] if BACKEND == "torch" else [512, 1024, 2048, 4096]
SIZES = dict(d_model=D, num_layers=8, num_heads=4)
HYBRID = dict(mamba_ratio=7, moe_frequency=2)


def attention_alone():
    """Returns a backbone of attention alone, with the `d_ff` that gives it the hybrid's number of parameters."""
    target = JambaBackbone(**SIZES, **HYBRID).count_params()
    count = lambda d_ff: JambaBackbone(**SIZES, mamba_ratio=0, moe_frequency=2, d_ff=d_ff).count_params()  # noqa: E731
    slope = (count(512) - count(256)) / 256
    return JambaBackbone(**SIZES, mamba_ratio=0, moe_frequency=2, d_ff=round(256 + (target - count(256)) / slope))


CONTESTANTS = {
    "Mamba layer": lambda: MambaLayer(D, mixer_rms_norm=True),
    "attention layer": lambda: AttentionLayer(D, num_heads=4),
    "MoE layer": lambda: MoELayer(D),
    "JambaBackbone": lambda: JambaBackbone(**SIZES, **HYBRID),
    "attention backbone": attention_alone,
}


def gradient(name, tokens):
    layer = CONTESTANTS[name]()
    x = np.random.default_rng(0).standard_normal((1, tokens, D)).astype("float32")
    if not layer.built:
        layer.build(x.shape)
    return measure.layer_pair(layer, x)[1]


def measurements(rounds):
    rows = {name: {"ms": [], "MiB": []} for name in CONTESTANTS}
    for tokens in LENGTHS:
        seconds = measure.interleaved({name: gradient(name, tokens) for name in CONTESTANTS}, rounds)
        for name, row in rows.items():
            row["ms"].append(round(1e3 * seconds[name], 1))
            row["MiB"].append(measure.memory_in_a_process(__spec__.name, name, tokens))
        print(
            tokens, {name: (row["ms"][-1], row["MiB"][-1]) for name, row in rows.items()}, file=sys.stderr, flush=True
        )
    return rows


def slope(values):
    """Returns the exponent of the growth with the number of tokens, over the last doubling."""
    return round(math.log2(values[-1] / max(values[-2], 1e-9)), 2)


def crossover(rows):
    """Returns the number of tokens from which the hybrid is faster; "below N" or "above N" outside of `LENGTHS`."""
    gap = [math.log(a / h) for a, h in zip(rows["attention backbone"]["ms"], rows["JambaBackbone"]["ms"], strict=True)]
    if gap[0] > 0 or gap[-1] < 0:
        return f"{'below' if gap[0] > 0 else 'above'} {LENGTHS[0 if gap[0] > 0 else -1]}"
    last = max(i for i, g in enumerate(gap) if g <= 0)
    return round(LENGTHS[last] * 2 ** (-gap[last] / (gap[last + 1] - gap[last])))


def plot(rows, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for axis, unit, title in zip(axes, ("ms", "MiB"), ("time, ms", "peak memory, MiB"), strict=True):
        for name, row in rows.items():
            axis.loglog(LENGTHS, row[unit], marker="o", label=name)
        axis.set(xlabel="tokens", ylabel=title, title=f"{title}, forward and backward, {BACKEND}")
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help="JSON [name, tokens]: print only the peak memory of this case")
    args = parser.parse_args()
    if args.memory:
        print(measure.extra_memory(gradient(*json.loads(args.memory))))
        return
    rows = measurements(args.rounds)
    for unit in ("ms", "MiB"):
        table = [
            {"": name, **dict(zip(map(str, LENGTHS), row[unit], strict=True)), "slope": slope(row[unit])}
            for name, row in rows.items()
        ]
        print(f"{unit}:\n{measure.table(table, ['', *map(str, LENGTHS), 'slope'])}")
    print(f"The hybrid is faster from {crossover(rows)} tokens.")
    results = {"backend": BACKEND, "lengths": LENGTHS, "rows": rows, "crossover": crossover(rows)}
    plot(rows, measure.record(f"cost_{BACKEND}", results).with_suffix(".png"))


if __name__ == "__main__":
    main()

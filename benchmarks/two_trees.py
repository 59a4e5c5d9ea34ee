"""Compares the speed of two checkouts, for changes that must not affect it.

    KERAS_BACKEND=torch python benchmarks/two_trees.py OLD NEW [--pairs 15] [--core 0] [--work scan step decode]
    python benchmarks/two_trees.py --read PAIRS.json ... [--record NAME]

OLD and NEW are folders with the package. This file is a script and not a module of `benchmarks`, so that only OLD or
NEW is on the import path: `python -m` would put the current checkout there first.

Processes alternate between the two checkouts. Each process measures all work: the scan "native" and "portable", forward
and with gradients; a step of `fit` with 0.8 M parameters; and decoding with a model of 32 M parameters. On a GPU the
work is the Triton scan, a step of a language model, and the captured step of `fit`.

Prints the median ratio new/old per work with its 95 % interval (bootstrap over pairs). It prints no ratio unless the
outputs of both checkouts agree. `--save` writes the pairs, and `--read` merges the pairs of several runs.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# GPU kernels sum in any order, and a few training steps amplify the differences.
TOLERANCE = 1e-4


def synchronized(function, calls):
    """Returns a function that calls `function` several times and then synchronises the device."""
    import torch

    def run():
        for _ in range(calls):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def seconds(function, repeats):
    """Returns the least seconds of several calls, after two warm-up calls: other processes only add time."""
    function(), function()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)


def seconds_of_calls(function, repeats, calls):
    """Returns the seconds of one of `calls` consecutive calls: the least, or on a GPU the median time of its kernels.

    The GPU first sleeps, so that the host has launched all kernels when the first one begins.
    """
    import torch

    if not torch.cuda.is_available():
        return seconds(synchronized(function, calls), repeats) / calls
    for _ in range(3):
        function()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(found)


def packing(batch, length):
    """Returns `{name: tokens}` of a packed batch: documents of random lengths, about 128 tokens, and 5 % padding."""
    import numpy as np

    rng = np.random.default_rng(0)
    ids = np.cumsum(rng.random((batch, length)) < 1 / 128, axis=1).astype("int32")
    return {"": {}, " of documents": {"segment_ids": ids}, " with padding": {"mask": rng.random(ids.shape) < 0.95}}


def time_scans(implementations, shape, dtype, repeats, calls, packed=False):
    """Returns `{work: (seconds, mean absolute output)}` of scans of shape `(b, t, e)` with 16 states."""
    import keras
    import measure
    import numpy as np

    import keras_jamba

    batch, length, channels = shape
    rng = np.random.default_rng(0)
    normal = lambda *size: keras.ops.cast(rng.standard_normal(size).astype("float32"), dtype)  # noqa: E731
    tensors = [normal(*shape), normal(*shape), -keras.ops.exp(normal(channels, 16))]
    tensors += [normal(batch, length, 16), normal(batch, length, 16), normal(channels)]
    found, weight = {}, normal(*shape)
    for name, (kind, tokens) in itertools.product(implementations, packing(batch, length).items()):
        if bool(tokens) != packed:
            continue
        tokens = {key: keras.ops.convert_to_tensor(x) for key, x in tokens.items()}
        scan = lambda *given, name=name, tokens=tokens: keras_jamba.ops.selective_scan(  # noqa: E731
            *given, delta_softplus=True, implementation=name, **tokens
        )
        forward, both = measure.forward_and_gradient(scan, [*tensors, weight])
        mean_output = float(np.abs(keras.ops.convert_to_numpy(keras.ops.cast(scan(*tensors), "float32"))).mean())
        work = f"scan {name}{kind}"
        found[f"{work}, forward"] = seconds_of_calls(forward, repeats, calls), mean_output
        found[f"{work}, forward and gradient"] = seconds_of_calls(both, repeats, calls), mean_output
    return found


def time_layers(batch, length, width, dtype, repeats):
    """Returns `{work: (seconds, mean absolute output)}` of packed layers of attention and of experts.

    The mean counts padding as zeros, which its outputs are only in later trees.
    """
    import keras
    import measure
    import numpy as np

    from keras_jamba.layers import AttentionLayer, MoELayer

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    normal = lambda: keras.ops.cast(rng.standard_normal((batch, length, width)).astype("float32"), dtype)  # noqa: E731
    tensors, found = [normal(), normal()], {}
    attention, experts = AttentionLayer(width, 8, dtype=dtype), MoELayer(width, d_ff=width, dtype=dtype)
    attention.build((None, None, width)), experts.build((None, None, width))
    work = {f"attention{kind}": (attention, tokens) for kind, tokens in packing(batch, length).items()}
    for name, (layer, tokens) in (work | {"experts": (experts, {})}).items():
        tokens = {key: keras.ops.convert_to_tensor(x) for key, x in tokens.items()}
        call = lambda x, layer=layer, tokens=tokens: stateless(layer, x, tokens)  # noqa: E731
        forward, both = measure.forward_and_gradient(call, tensors)
        y = keras.ops.convert_to_numpy(keras.ops.cast(call(tensors[0]), "float32"))
        mean_output = float(np.abs(y * keras.ops.convert_to_numpy(tokens.get("mask", 1))[..., None]).mean())
        found[f"{name}, forward"] = seconds_of_calls(forward, repeats, 2), mean_output
        found[f"{name}, forward and gradient"] = seconds_of_calls(both, repeats, 2), mean_output
    return found


def stateless(layer, x, tokens):
    """Returns the outputs of a layer, with the auxiliary loss added to them, and leaves its variables unchanged."""
    import keras

    with keras.StatelessScope(collect_losses=True) as scope:
        y = layer(x, **tokens)
    return y + sum(keras.ops.cast(loss, y.dtype) for loss in scope.losses)


# `benchmarks.images.sizes.SIZES["small"]`; this script cannot import its package.
MODEL_OF_IMAGES = dict(d_model=40, num_layers=8, mamba_ratio=7, moe_frequency=2, num_experts=8, num_heads=4)


def time_fit_step(batch, steps):
    """Returns the median seconds of a step of `fit`, after a warm-up epoch, and the first loss."""
    import keras
    import numpy as np

    import keras_jamba

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    model = keras_jamba.DHCJamba(**MODEL_OF_IMAGES)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss)
    given = rng.random((batch * steps, 32, 32, 3), "float32"), rng.integers(0, 10, batch * steps)
    found = []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.started = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            float(logs["loss"])
            found.append(time.perf_counter() - self.started)

    history = model.fit(*given, batch_size=batch, epochs=3, shuffle=False, verbose=0, callbacks=[Clock()])
    return {"step of fit": (statistics.median(found[steps:]), history.history["loss"][0])}


def language_model(sizes):
    import keras

    import keras_jamba

    keras.utils.set_random_seed(0)
    return keras_jamba.JambaCausalLM(**sizes)


MODEL_32M = dict(vocab_size=1000, d_model=256, d_ff=1024, num_layers=8, num_heads=8, num_kv_heads=4, num_experts=8)
MODEL_GPU = dict(vocab_size=8192, d_model=768, d_ff=2048, num_layers=8, num_heads=12, num_kv_heads=4, num_experts=8)


def time_decoding(tokens, repeats):
    import numpy as np

    model = language_model(MODEL_32M)
    ids = np.random.default_rng(0).integers(3, 1000, (1, 16))
    run = lambda: model.generate(ids, max_new_tokens=tokens, stop_token_ids=None)  # noqa: E731
    return {"decoding": (seconds(run, repeats), float(np.mean(run())))}


def time_language_step(repeats):
    import keras
    import numpy as np

    keras.config.set_dtype_policy("mixed_bfloat16")
    model = language_model(MODEL_GPU)
    model.compile(keras.optimizers.AdamW(1e-4))
    ids = np.random.default_rng(0).integers(0, 8192, (2, 2049)).astype("int32")
    losses = []

    def run():
        loss, *_ = np.ravel(model.train_on_batch(ids[:, :-1], ids[:, 1:]))
        losses.append(float(loss))

    return {"step of the language model": (seconds(run, repeats), losses[0])}


def print_measurements(work):
    """Measures all work in this process and prints it as one line of JSON."""
    from keras_jamba import _backend

    name = getattr(_backend, "tensors", _backend).platform()
    found = {}
    if "scan" in work:
        found |= {
            "cpu": lambda: time_scans(("native", "portable"), (4, 256, 64), "float32", 41, calls=4),
            "gpu": lambda: time_scans(("triton",), (8, 2048, 2048), "bfloat16", 15, calls=10),
        }[name]()
    if "packed" in work:
        found |= {
            "cpu": lambda: (
                time_scans(("native", "portable"), (4, 256, 64), "float32", 15, calls=4, packed=True)
                | time_layers(4, 256, 128, "float32", 9)
            ),
            "gpu": lambda: (
                time_scans(("triton",), (8, 2048, 2048), "bfloat16", 15, calls=10, packed=True)
                | time_layers(8, 2048, 1024, "bfloat16", 15)
            ),
        }[name]()
    if "step" in work:
        found |= {"cpu": lambda: time_fit_step(8, 4), "gpu": lambda: time_fit_step(64, 20)}[name]()
    if "decode" in work and name == "cpu":
        found |= time_decoding(32, 5)
    if "language" in work and name == "gpu":
        found |= time_language_step(15)
    print("\n" + json.dumps(found))


def process(tree, args):
    """Measures `tree` in a separate process and returns its figures."""
    command = [sys.executable, str(HERE / "two_trees.py"), tree, tree, "--measure", "--work", *args.work]
    if args.core is not None:
        command = ["taskset", "-c", args.core, *command]
    path = os.pathsep.join([str(Path(tree).resolve()), str(HERE.resolve()), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, cwd="/")
    if done.returncode:
        raise RuntimeError(f"A process with {tree} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def interval(ratios, draws=10000):
    """Returns the 95 % interval of the median, by bootstrap."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


def summary(pairs):
    """Returns `{work: figures}`. Raises AssertionError if the outputs of the two trees differ."""
    found = {}
    for name in pairs[0]["new"]:
        both = [(pair["new"][name], pair["old"][name]) for pair in pairs if name in pair["new"]]
        for (_, new), (_, old) in both:
            if abs(new - old) > TOLERANCE * max(abs(old), 1):
                raise AssertionError(f"{name}: the new tree gives {new}, the old one {old}")
        low, high = interval(ratios := [new / old for (new, _), (old, _) in both])
        found[name] = {
            "pairs": len(both),
            "ratio": statistics.median(ratios),
            "interval": [low, high],
            "new ms": 1000 * statistics.median(new for (new, _), _ in both),
            "old ms": 1000 * statistics.median(old for _, (old, _) in both),
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--core", help="the cores that each process runs on, as for taskset")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new pair starts")
    parser.add_argument("--work", nargs="*", default=["scan", "packed", "step", "decode", "language"])
    parser.add_argument("--save", help="file that the pairs are written to after each pair")
    parser.add_argument("--read", nargs="*", default=[], help="files of pairs to merge")
    parser.add_argument("--record", help="name of the file in results/ to write, without .json")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print_measurements(args.work)
    pairs, started = [pair for file in args.read for pair in json.loads(Path(file).read_text())], time.perf_counter()
    while args.old and len(pairs) < args.pairs and time.perf_counter() - started < args.limit:
        order = [("old", args.old), ("new", args.new)]
        pairs.append({which: process(tree, args) for which, tree in order[:: 1 if len(pairs) % 2 else -1]})
        print(f"pair {len(pairs)}", file=sys.stderr, flush=True)
        if args.save:
            Path(args.save).write_text(json.dumps(pairs))
    import measure

    found = summary(pairs)
    for name, row in found.items():
        low, high = row["interval"]
        times = f"{row['pairs']} pairs, new {row['new ms']:.3f} ms, old {row['old ms']:.3f} ms"
        print(f"{name}: {times}, ratio {row['ratio']:.3f} [{low:.3f}, {high:.3f}]")
    if args.record:
        measure.record(args.record, {"work": found})
    return None


if __name__ == "__main__":
    main()

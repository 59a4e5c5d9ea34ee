"""Tokens a second of training a Jamba language model on several GPUs of one machine, split in several ways, on JAX.

    KERAS_BACKEND=jax python benchmarks/gpu_sharding.py [--batch 4] [--smoke]

The model is that of gpu_lm.py. First a tiny one in float32 takes three steps in each way, and losses and weights must
be those of one GPU. Then all ways are timed in one interleaved run, with as many rows for each GPU; what a GPU holds
of weights and of the optimizer is counted from its parts. `--smoke` is for a CPU with several simulated devices and
records nothing. Prints a table and writes results/gpu_sharding.json.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import gpu_lm
import jax
import keras
import measure
import numpy as np

import keras_jamba
from keras_jamba import training

# Largest differences allowed to one device, of losses and of weights.
TOLERANCE = 1e-5
TINY = dict(d_model=64, num_layers=4, mamba_ratio=1, num_heads=8, num_kv_heads=8, num_experts=8, d_ff=64)


def ways(count):
    """`{name: (mesh, sequence_parallel, fully_sharded)}`."""
    found = {
        "rows": ((count, 1), False, False),
        "rows, matrices shared": ((count, 1), False, True),
        "model": ((1, count), False, False),
        "model, tokens split": ((1, count), True, False),
    }
    if count >= 4:
        found["rows and model"] = ((2, count // 2), False, False)
        found["rows and model, matrices shared"] = ((2, count // 2), False, True)
    return found


def distributed(way):
    """A context for a way; nothing for None."""
    if way is None:
        return contextlib.nullcontext()
    mesh = keras.distribution.DeviceMesh(way[0], ("batch", "model"), keras.distribution.list_devices())
    return keras.distribution.ModelParallel(layout_map=training.layout_map(mesh, *way[1:])).scope()


def step(model, tokens):
    return model.train_on_batch(tokens[:, :-1], tokens[:, 1:], return_dict=True)["loss"]


def descent(way):
    """Losses and weights of three steps of a tiny model."""
    keras.utils.set_random_seed(0)
    tokens = np.random.default_rng(0).integers(0, 64, (16, 65), "int32")
    with distributed(way), gpu_lm.without_tf32():
        model = keras_jamba.JambaCausalLM(vocab_size=64, dtype="float32", **TINY)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), weighted_metrics=None)
        losses = [float(step(model, tokens)) for _ in range(3)]
        return losses, [np.asarray(v.value) for v in model.trainable_variables]


def check(ways):
    """`{name: largest differences to one device}`; raises where they are too large."""
    losses, weights = descent(None)
    found = {}
    for name, way in ways.items():
        others, moved = descent(way)
        differences = {
            "losses": max(abs(a / b - 1) for a, b in zip(others, losses, strict=True)),
            "weights": max(float(np.abs(a - b).max()) for a, b in zip(moved, weights, strict=True)),
        }
        print(f"{name}: losses {others} beside {losses}, largest differences {differences}", flush=True)
        if max(differences.values()) > TOLERANCE:
            raise AssertionError(f"{name}: a difference of more than {TOLERANCE}.")
        found[name] = differences
    return found


def step_of(way, folder, rows, length):
    """A function without arguments that takes a step, and the bytes that a device holds between two."""
    with distributed(way):
        model = keras_jamba.JambaCausalLM.from_preset(folder, load_weights=False, dtype=gpu_lm.POLICY)
        model.compile(training.optimizer(model, steps=10000), weighted_metrics=None)
    tokens = np.random.default_rng(0).integers(0, model.get_config()["vocab_size"], (rows, length + 1), "int32")

    def timed():
        with distributed(way):
            return float(step(model, tokens))

    print(f"{way}: loss {timed():.3f}", flush=True)
    parts = [v.value.addressable_shards[0].data for v in model.variables + model.optimizer.variables]
    return timed, sum(x.nbytes for x in parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="rows for each device")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.rounds = 1, 64, 1
    count = jax.device_count()
    if count < 2:
        parser.error(f"This needs several devices. Received: {count}. Run it on a machine with more GPUs.")
    checked = check(ways(count))
    steps, held, rows = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "model"
        gpu_lm.write(folder, gpu_lm.TINY if args.smoke else gpu_lm.LARGE, 1, 1)
        for name, way in {"one": None, **ways(count)}.items():
            rows[name] = args.batch * (1 if way is None else count)
            steps[name], held[name] = step_of(way, folder, rows[name], args.length)
    seconds = measure.interleaved(steps, args.rounds)
    rate = {name: rows[name] * args.length / value for name, value in seconds.items()}
    found = {
        name: {
            "milliseconds a step": round(1000 * seconds[name], 2),
            "tokens a second": round(rate[name]),
            "times one device": round(rate[name] / rate["one"], 2),
            "GB held by a device": round(held[name] / 1e9, 3),
        }
        for name in steps
    }
    table = [{"": name} | row for name, row in found.items()]
    print(measure.table(table, list(table[0])))
    if args.smoke:
        return
    how = {"devices": count, "rows for each": args.batch, "length": args.length, "rounds": args.rounds}
    meshes = {name: list(way[0]) for name, way in ways(count).items()}
    device = {"device": keras_jamba._backend.device.device_name(), "policy": gpu_lm.POLICY}
    measure.record("gpu_sharding", device | how | {"meshes": meshes, "differences": checked, "training": found})


if __name__ == "__main__":
    main()

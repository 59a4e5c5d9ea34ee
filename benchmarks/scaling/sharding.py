"""Training speed of a Jamba language model on several GPUs of one machine, sharded in several ways, on JAX.

    KERAS_BACKEND=jax python -m benchmarks.scaling.sharding [--batch 4] [--smoke]

The model is that of `benchmarks.training.language_model`. The script first trains a tiny float32 model for three steps
with each strategy: losses and weights must be those of one GPU. It then times all strategies in one interleaved run,
with equal rows per GPU, and sums the bytes of weights and optimizer that one GPU holds. `--smoke` is for a CPU with
several simulated devices and records nothing. Prints a table and writes results/gpu_sharding.json.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import jax
import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.training import language_model
from keras_jamba import training

# Largest allowed differences to one device: relative for losses, absolute for weights.
TOLERANCE = 1e-5
TINY = dict(d_model=64, num_layers=4, mamba_ratio=1, num_heads=8, num_kv_heads=8, num_experts=8, d_ff=64)


def strategies(count):
    """Returns `{name: (mesh, sequence_parallel, fully_sharded)}`."""
    results = {
        "rows": ((count, 1), False, False),
        "rows, matrices shared": ((count, 1), False, True),
        "model": ((1, count), False, False),
        "model, tokens split": ((1, count), True, False),
    }
    if count >= 4:
        results["rows and model"] = ((2, count // 2), False, False)
        results["rows and model, matrices shared"] = ((2, count // 2), False, True)
    return results


def distribution_scope(strategy):
    """Returns the context of a strategy, or an empty context for None."""
    if strategy is None:
        return contextlib.nullcontext()
    mesh = keras.distribution.DeviceMesh(strategy[0], ("batch", "model"), keras.distribution.list_devices())
    return keras.distribution.ModelParallel(layout_map=training.layout_map(mesh, *strategy[1:])).scope()


def step(model, tokens):
    return model.train_on_batch(tokens[:, :-1], tokens[:, 1:], return_dict=True)["loss"]


def train_tiny_model(strategy):
    """Returns losses and weights of three steps of a tiny model."""
    keras.utils.set_random_seed(0)
    tokens = np.random.default_rng(0).integers(0, 64, (16, 65), "int32")
    with distribution_scope(strategy), language_model.without_tf32():
        model = keras_jamba.JambaCausalLM(vocab_size=64, dtype="float32", **TINY)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), weighted_metrics=None)
        losses = [float(step(model, tokens)) for _ in range(3)]
        return losses, [np.asarray(v.value) for v in model.trainable_variables]


def check(strategies):
    """Returns `{name: largest differences to one device}`. Raises AssertionError if they are too large."""
    losses, weights = train_tiny_model(None)
    results = {}
    for name, strategy in strategies.items():
        sharded_losses, sharded_weights = train_tiny_model(strategy)
        differences = {
            "losses": max(abs(a / b - 1) for a, b in zip(sharded_losses, losses, strict=True)),
            "weights": max(float(np.abs(a - b).max()) for a, b in zip(sharded_weights, weights, strict=True)),
        }
        print(f"{name}: losses {sharded_losses} beside {losses}, largest differences {differences}", flush=True)
        if max(differences.values()) > TOLERANCE:
            raise AssertionError(
                f"{name}: the differences to one device must be at most {TOLERANCE}. Received: {differences}."
            )
        results[name] = differences
    return results


def step_and_bytes(strategy, folder, rows, length):
    """Returns a function without arguments that runs one step, and the bytes that a device holds between steps."""
    with distribution_scope(strategy):
        model = keras_jamba.JambaCausalLM.from_preset(folder, load_weights=False, dtype=language_model.POLICY)
        model.compile(training.optimizer(model, steps=10000), weighted_metrics=None)
    tokens = np.random.default_rng(0).integers(0, model.get_config()["vocab_size"], (rows, length + 1), "int32")

    def timed_step():
        with distribution_scope(strategy):
            return float(step(model, tokens))

    print(f"{strategy}: loss {timed_step():.3f}", flush=True)
    shards = [v.value.addressable_shards[0].data for v in model.variables + model.optimizer.variables]
    return timed_step, sum(x.nbytes for x in shards)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="rows per device")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.rounds = 1, 64, 1
    count = jax.device_count()
    if count < 2:
        parser.error(f"This benchmark needs several devices. Received: {count}. Run it on a machine with more GPUs.")
    differences = check(strategies(count))
    steps, bytes_held, rows = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "model"
        language_model.write_model_folder(folder, language_model.TINY if args.smoke else language_model.LARGE, 1, 1)
        for name, strategy in {"one": None, **strategies(count)}.items():
            rows[name] = args.batch * (1 if strategy is None else count)
            steps[name], bytes_held[name] = step_and_bytes(strategy, folder, rows[name], args.length)
    seconds = measure.interleaved(steps, args.rounds)
    rate = {name: rows[name] * args.length / value for name, value in seconds.items()}
    results = {
        name: {
            "milliseconds a step": round(1000 * seconds[name], 2),
            "tokens a second": round(rate[name]),
            "times one device": round(rate[name] / rate["one"], 2),
            "GB held by a device": round(bytes_held[name] / 1e9, 3),
        }
        for name in steps
    }
    table = [{"": name} | row for name, row in results.items()]
    print(measure.table(table, list(table[0])))
    if args.smoke:
        return
    settings = {"devices": count, "rows for each": args.batch, "length": args.length, "rounds": args.rounds}
    meshes = {name: list(strategy[0]) for name, strategy in strategies(count).items()}
    device = {"device": keras_jamba._backend.device.device_name(), "policy": language_model.POLICY}
    measure.record(
        "gpu_sharding", device | settings | {"meshes": meshes, "differences": differences, "training": results}
    )


if __name__ == "__main__":
    main()

"""Memory and time of gradient checkpointing on a CPU, on the backend that KERAS_BACKEND names.

    KERAS_BACKEND=jax python -m benchmarks.training.checkpointing

Runs forward and backward of `JambaBackbone` (8 layers, one with attention, 4 with experts) without and with
checkpointing. The script first compares the gradients. It then times both in one interleaved run, and measures each
peak memory in a separate process. Prints a table and writes results/checkpointing_BACKEND.json.
"""

import argparse
import json

import keras
import numpy as np
from keras import ops

import keras_jamba
from benchmarks import measure

BACKEND = keras.backend.backend()
SIZES = dict(d_model=64, num_layers=8, mamba_ratio=7, num_experts=8)
TOKENS = (1, 4096)


def gradient(checkpointing):
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaBackbone(**SIZES, gradient_checkpointing=checkpointing)
    x = np.random.default_rng(0).standard_normal((*TOKENS, SIZES["d_model"])).astype("float32")
    return measure.layer_pair(model, x, training=True)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help="JSON [off or on]: print only the peak memory of this case")
    args = parser.parse_args()
    if args.memory:
        print(measure.extra_memory(gradient(json.loads(args.memory)[0] == "on")))
        return
    functions = {"off": gradient(False), "on": gradient(True)}
    for a, b in zip(*(f() for f in functions.values()), strict=True):
        a, b = ops.convert_to_numpy(a), ops.convert_to_numpy(b)
        np.testing.assert_allclose(b, a, atol=1e-4 * max(1.0, np.abs(a).max()))
    seconds = measure.interleaved(functions, args.rounds)
    rows = [
        {
            "checkpointing": name,
            "ms": round(1e3 * seconds[name]),
            "peak MiB": measure.memory_in_a_process(__spec__.name, name),
        }
        for name in functions
    ]
    print(measure.table(rows, list(rows[0])))
    measure.record(f"checkpointing_{BACKEND}", {"backend": BACKEND, "model": SIZES, "tokens": TOKENS, "rows": rows})


if __name__ == "__main__":
    main()

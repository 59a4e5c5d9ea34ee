"""Cost of a packed training step, beside the plain step of as many tokens.

    KERAS_BACKEND=jax python -m benchmarks.training.packed

The step is `train_on_batch` of a language model with attention in one layer of eight. Plain rows are one document each.
Packed rows hold documents of random lengths, on average 256 tokens, with `segment_ids`. On a CPU the model is small.
On a GPU it is that of `benchmarks.training.language_model`. The script first checks that a packed row gives the losses
of its documents alone. It then times all steps in one interleaved run. On a CPU it also measures the peak memory in
separate processes. Prints the rows and writes results/packed_BACKEND.json, or gpu_packed_BACKEND.json on a GPU.
"""

import argparse
import json

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.training.language_model import LARGE, POLICY
from keras_jamba import _backend, training
from keras_jamba.converters import jamba

BACKEND = keras.backend.backend()
ON_GPU = _backend.tensors.platform() == "gpu"
DOCUMENT = 256
SMALL = dict(vocab_size=256, d_model=128, num_layers=8, mamba_ratio=7, num_heads=4, moe_frequency=0)
# Rows and tokens per batch.
SHAPES = {"gpu": [(4, 4096)], "cpu": [(2, 1024), (1, 4096)]}["gpu" if ON_GPU else "cpu"]


def model_of():
    keras.utils.set_random_seed(0)
    if not ON_GPU:
        return keras_jamba.JambaCausalLM(**SMALL)
    config = {"model_type": "jamba", "architectures": ["JambaForCausalLM"]} | LARGE
    return keras_jamba.JambaCausalLM(**jamba.arguments(config), dtype=POLICY)


def batch_of(kind, rows, tokens):
    """Returns inputs and targets of random tokens, for the kind "plain" or "packed"."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (rows, tokens + 1)).astype("int32")
    inputs = {"token_ids": ids[:, :-1]}
    if kind == "packed":
        inputs["segment_ids"] = np.cumsum(rng.random((rows, tokens)) < 1 / DOCUMENT, axis=1).astype("int32")
    return inputs, ids[:, 1:]


def step_of(kind, rows, tokens):
    """Returns a training step as a function without arguments."""
    model, batch = model_of(), batch_of(kind, rows, tokens)
    model.compile(training.optimizer(model, steps=10000), weighted_metrics=None)
    return lambda: model.train_on_batch(*batch)


def check():
    """Compares the logits of a packed row with those of its documents alone, in a small float32 model."""
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(**SMALL)
    inputs, _ = batch_of("packed", 1, 1024)
    packed = keras.ops.convert_to_numpy(model(inputs))[0]
    ids = inputs["segment_ids"][0]
    for document in np.unique(ids)[:4]:
        alone = model({"token_ids": inputs["token_ids"][:, ids == document]})
        np.testing.assert_allclose(packed[ids == document], keras.ops.convert_to_numpy(alone)[0], rtol=1e-3, atol=1e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", help="JSON [kind, rows, tokens]: print only the peak MiB of its step")
    args = parser.parse_args()
    if args.memory:
        print(measure.extra_memory(step_of(*json.loads(args.memory))))
        return
    check()
    rows = []
    for shape in SHAPES:
        steps = {kind: step_of(kind, *shape) for kind in ("plain", "packed")}
        for step in steps.values():
            # PyTorch captures the fourth step on a GPU.
            for _ in range(4):
                step()
        seconds = measure.interleaved(steps, args.rounds)
        row = {"rows": shape[0], "tokens": shape[1]}
        row |= {f"{kind}, ms": round(1e3 * value, 1) for kind, value in seconds.items()}
        row["packed / plain"] = round(seconds["packed"] / seconds["plain"], 3)
        if not ON_GPU:
            row |= {f"{kind}, MiB": measure.memory_in_a_process(__spec__.name, kind, *shape) for kind in steps}
        rows.append(row)
        print(row, flush=True)
    measure.record(f"{'gpu_' if ON_GPU else ''}packed_{BACKEND}", {"backend": BACKEND, "rows": rows})


if __name__ == "__main__":
    main()

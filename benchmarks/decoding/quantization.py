"""Quantized weights: size, memory of loading, errors of the logits, equal best tokens, and speed.

    KERAS_BACKEND=jax python -m benchmarks.decoding.quantization

The model is that of `benchmarks.decoding.decode`, with 32 M random parameters. The peer is the same model in float32.
Random weights are the hard case: rounding can change the choice of experts. Writes results/quantization_BACKEND.json.
"""

import argparse
import functools
import gc
import json
import tempfile
from pathlib import Path

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.decoding.decode import model_pair

MODES = (None, "experts_int8", "int8", "int4")
PROMPT, NEW, LONG = 16, 64, 512


def load(folder, mode):
    return keras_jamba.JambaCausalLM.from_preset(folder, quantization=mode)


def size(model):
    return sum(np.asarray(keras.ops.convert_to_numpy(v.value)).nbytes for v in model.weights)


def logits(model, ids):
    values = [[v.value for v in part] for part in (model.trainable_variables, model.non_trainable_variables)]
    return keras.ops.convert_to_numpy(model.stateless_call(*values, ids)[0])


def speeds(models, rounds):
    """Returns tokens per second of decoding at batch 1 and 8, and of prefilling a long prompt."""
    found = {}
    for batch, prompt, new in ((1, PROMPT, NEW), (8, PROMPT, NEW), (1, LONG, 1)):
        ids = np.random.default_rng(batch).integers(3, 1000, (batch, prompt))
        given = dict(max_new_tokens=new, stop_token_ids=None, strip_prompt=True)
        functions = {mode: functools.partial(model.generate, ids, **given) for mode, model in models.items()}
        times = measure.interleaved(functions, rounds)
        name = f"decoding, batch {batch}" if new > 1 else f"reading {prompt} tokens"
        found[name] = {mode: batch * (new if new > 1 else prompt) / times[mode] for mode in models}
    return found


def loading_memory(folder, mode):
    """Returns the peak MB of anonymous memory while loading, without mapped files."""
    load(folder, mode)  # warm-up, for everything that loads only once
    gc.collect()
    return measure.peak_anonymous(lambda: load(folder, mode))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(loading_memory(*json.loads(args.memory)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model_pair(Path(folder) / "jamba")
        # TensorFlow's allocator keeps the memory of the first loading, so a second one cannot be measured.
        measured_modes = () if keras.backend.backend() == "tensorflow" else MODES
        peaks = {mode: measure.memory_in_a_process(__spec__.name, f"{folder}/jamba", mode) for mode in measured_modes}
        models = {mode: load(Path(folder) / "jamba", mode) for mode in MODES}
    ids = np.random.default_rng(0).integers(3, 1000, (4, 64))
    exact = logits(models[None], ids)
    rates = speeds(models, args.rounds)
    rows = []
    for mode, model in models.items():
        actual = logits(model, ids)
        row = {"weights": mode or "float32", "MB": round(size(model) / 1e6, 1)}
        row |= {"loading, MB": peaks[mode]} if mode in peaks else {}
        row["error, %"] = round(100 * float(np.linalg.norm(actual - exact) / np.linalg.norm(exact)), 2)
        row["same best token, %"] = round(100 * float((actual.argmax(-1) == exact.argmax(-1)).mean()), 1)
        rows.append(row | {name: round(by_mode[mode]) for name, by_mode in rates.items()})
    print(measure.table(rows, list(rows[0])))
    measure.record(f"quantization_{keras.backend.backend()}", {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()

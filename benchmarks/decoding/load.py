"""Time and memory of loading a checkpoint and of the first forward pass, with transformers as the peer.

    KERAS_BACKEND=jax python -m benchmarks.decoding.load [--shape 3B]

The checkpoint has random weights, written by transformers: 130 M parameters in float32, or the shape of AI21's Jamba
Reasoning 3B in bfloat16. Each load runs in a process of its own, with the file in the page cache. Processes of both
libraries alternate. Logits of 16 tokens are compared first. The times exclude imports. Memory is the peak of anonymous
memory while loading, without mapped files; on a GPU also the peak of the device. Writes results/load_BACKEND.json, or
gpu_load_BACKEND.json on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import measure

BACKEND = os.environ["KERAS_BACKEND"]
# The model of 130 M parameters, as changes to that of `benchmarks.training.language_model`.
MEDIUM = dict(vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8)
MEDIUM |= dict(num_attention_heads=8, num_key_value_heads=2)
TOKENS = np.arange(3, 19)[None]
# Logits of other libraries and dtypes, relative to the largest.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def write_checkpoint(folder, shape):
    """Writes a checkpoint with random weights and returns `(parameters, dtype)`."""
    import torch
    from transformers import JambaConfig, JambaForCausalLM

    from benchmarks.training.chat_adapters import REASONING_3B
    from benchmarks.training.language_model import LARGE

    config, dtype = (REASONING_3B, "bfloat16") if shape == "3B" else (LARGE | MEDIUM, "float32")
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = JambaForCausalLM(JambaConfig(**config, use_mamba_kernels=False))
    model.save_pretrained(folder)
    return sum(x.numel() for x in model.parameters()), dtype


def ours(folder, dtype):
    """Returns functions that load the model, and that return its logits."""
    import keras

    import keras_jamba

    # Creates the context of a device.
    keras.ops.convert_to_numpy(keras.ops.ones((2, 2)) @ keras.ops.ones((2, 2)))

    def load():
        return keras_jamba.JambaCausalLM.from_preset(folder, dtype=dtype)

    return load, lambda model: keras.ops.convert_to_numpy(model({"token_ids": TOKENS.astype("int32")}))


def theirs(folder, dtype):
    """Returns functions that load the model of transformers, and that return its logits."""
    import torch
    from transformers import JambaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)

    def load():
        model = JambaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map=device)
        if device == "cuda":
            torch.cuda.synchronize()
        return model

    def logits(model):
        with torch.inference_mode():
            return model(torch.tensor(TOKENS, device=device)).logits.float().cpu().numpy()

    return load, logits


def child(who, folder, dtype):
    """Loads once, and prints times and memory. Writes the logits to a file."""
    load, logits = {"ours": ours, "theirs": theirs}[who](folder, dtype)
    models, row = [], {}
    started = time.perf_counter()
    row["peak MB"] = measure.peak_anonymous(lambda: models.append(load()))
    row["load"] = time.perf_counter() - started
    started = time.perf_counter()
    np.save(Path(folder) / f"{who}.npy", logits(models[0]))
    row["forward"] = time.perf_counter() - started
    print(json.dumps(row))


def run(who, folder, dtype):
    command = [sys.executable, "-m", __spec__.name, "--child", who, "--folder", folder, "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def check(folder, dtype):
    found, expected = (np.load(Path(folder) / f"{who}.npy").astype("float32") for who in ("ours", "theirs"))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if not error < TOLERANCE[dtype]:
        raise AssertionError(f"Logits must be equal to {TOLERANCE[dtype]}. Received: an error of {error}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=("130M", "3B"), default="130M")
    for name in ("child", "folder", "dtype"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder, args.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        parameters, dtype = write_checkpoint(folder, args.shape)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        found = {"ours": [], "theirs": []}
        for i in range(args.rounds + 1):
            for who, rows in found.items():
                rows.append(run(who, folder, dtype))
            if not i:
                check(folder, dtype)
                for rows in found.values():
                    rows.clear()  # the first round fills the page cache
    medians = {
        who: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for who, rows in found.items()
    }
    for who, row in medians.items():
        print(who, {key: round(value, 3) for key, value in row.items()})
    seconds = {who: row["load"] + row["forward"] for who, row in medians.items()}
    print(
        f"{parameters:,} parameters, {size / 1e6:.0f} MB, time / transformers {seconds['ours'] / seconds['theirs']:.2f}"
    )
    name = f"{'gpu_' if measure.machine().get('gpus') else ''}load_{BACKEND}"
    measure.record(name, {"backend": BACKEND, "parameters": parameters, "MB": size / 1e6, "rows": medians})


if __name__ == "__main__":
    main()

"""The peak of a GPU's memory in training, and what `model_report` says it will be.

    KERAS_BACKEND=torch python benchmarks/memory.py [--measured FILE]

Three backbones in mixed bfloat16, with and without gradient checkpointing: three steps of training each, the peak of
the last two as PyTorch's allocator counts it. `--measured` takes the peaks from an earlier run's results instead, on
a machine without a GPU. Prints a table and writes results/memory_torch.json.
"""

import argparse
import gc
import json
from pathlib import Path

import keras
import measure
import numpy as np

import keras_jamba
from keras_jamba import estimation, training

POLICY = "mixed_bfloat16"
CONFIGS = {
    "experts": (dict(d_model=512, num_layers=8, num_experts=8, num_heads=8, num_kv_heads=2), 4, 512),
    "dense": (dict(d_model=1024, num_layers=8, moe_frequency=0, num_heads=16), 2, 1024),
    "half attention": (dict(d_model=768, num_layers=6, mamba_ratio=1, moe_frequency=3, num_heads=12), 2, 1024),
}


def peak(config, batch, context, checkpointing):
    """Bytes."""
    import torch

    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaBackbone(**config, gradient_checkpointing=checkpointing, dtype=POLICY)
    model.compile(training.optimizer(model, steps=100), "mse")
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((batch, context, config["d_model"])).astype("float32") for _ in range(2))
    model.train_on_batch(x, y)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        model.train_on_batch(x, y)
    found = torch.cuda.max_memory_allocated()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path)
    args = parser.parse_args()
    earlier = json.loads(args.measured.read_text()) if args.measured else None
    rows = []
    for name, (config, batch, context) in CONFIGS.items():
        for checkpointing in (False, True):
            report = estimation.model_report(
                config,
                batch_size=batch,
                context=context,
                dtype=POLICY,
                gradient_checkpointing=checkpointing,
                platform="gpu",
            )
            row = {"model": name, "checkpointing": checkpointing, "estimate": report.peak}
            if earlier:
                row["measured"] = earlier["peaks"][len(rows)]["measured"]
            else:
                row["measured"] = peak(config, batch, context, checkpointing)
            row["ratio"] = round(row["estimate"] / row["measured"], 3)
            rows.append(row)
            print(row, flush=True)
    print(measure.table(rows, list(rows[0])))
    earlier = earlier or {"device": keras_jamba._backend.device.device_name(), "measured on": measure.machine()}
    results = {name: earlier[name] for name in ("device", "measured on")}
    measure.record("memory_torch", results | {"policy": POLICY, "peaks": rows})


if __name__ == "__main__":
    main()

"""Peak GPU memory of training, compared with the estimate of `model_report`.

    KERAS_BACKEND=torch python -m benchmarks.training.memory [--measured FILE]

Trains three backbones in mixed bfloat16, with and without gradient checkpointing, for three steps each. The peak is
that of PyTorch's allocator over the last two steps. `--measured` reads the peaks from the results of an earlier run,
for machines without a GPU. Prints a table and writes results/memory_torch.json.
"""

import argparse
import gc
import json
from pathlib import Path

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from keras_jamba import estimation, training

POLICY = "mixed_bfloat16"
CONFIGS = {
    "experts": (dict(d_model=512, num_layers=8, num_experts=8, num_heads=8, num_kv_heads=2), 4, 512),
    "dense": (dict(d_model=1024, num_layers=8, moe_frequency=0, num_heads=16), 2, 1024),
    "half attention": (dict(d_model=768, num_layers=6, mamba_ratio=1, moe_frequency=3, num_heads=12), 2, 1024),
}


def measured_peak(config, batch, context, checkpointing):
    """Returns the measured peak in bytes."""
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
    measured = torch.cuda.max_memory_allocated()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return measured


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, help="results file of an earlier run to read the peaks from")
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
                row["measured"] = measured_peak(config, batch, context, checkpointing)
            row["ratio"] = round(row["estimate"] / row["measured"], 3)
            rows.append(row)
            print(row, flush=True)
    print(measure.table(rows, list(rows[0])))
    earlier = earlier or {"device": keras_jamba._backend.device.device_name(), "measured on": measure.machine()}
    results = {name: earlier[name] for name in ("device", "measured on")}
    measure.record("memory_torch", results | {"policy": POLICY, "peaks": rows})


if __name__ == "__main__":
    main()

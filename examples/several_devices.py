"""Trains a language model on one device or on all devices of several machines, on JAX.

    KERAS_BACKEND=jax python examples/several_devices.py         rows over all devices of this machine
    ... --mesh 2x4                                               rows over 2 times 4 devices, the model over the 4
    ... --mesh 8x1 --fully-sharded                               each device holds an eighth of weights and optimizer
    ... --mesh 1x8 --sequence-parallel                           the tokens of a row over 8 devices
    ... --coordinator 10.0.0.1:1234 --processes 4 --process 0    one of four processes, one per machine

A killed training resumes when the script runs again, also on another mesh. With
XLA_FLAGS=--xla_force_host_platform_device_count=8 a CPU acts as eight devices. Writes to --output: saves/, log.csv.
"""

import argparse
import re
from pathlib import Path

import keras
import numpy as np
from text_corpus import documents

import keras_jamba
from keras_jamba import training
from keras_jamba.tokenizers import ByteTokenizer

SIZES = {
    "large": dict(d_model=768, num_layers=16, num_heads=12, num_kv_heads=4, num_experts=8, d_ff=2048),
    "small": dict(d_model=128, num_layers=8, num_heads=8, num_experts=8, d_ff=256),
    "smoke": dict(d_model=32, num_layers=2, mamba_ratio=1, num_heads=8, num_experts=8, d_ff=32),
}


def mesh_of(text):
    """Returns the mesh shape `(rows, model)` of a text such as "2x4"."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"A mesh must be ROWSxMODEL. Received: {text!r}. Pass for example 2x4.")
    return tuple(map(int, found.groups()))


def distribution(args):
    """Returns a `ModelParallel` of the devices of all processes."""
    devices = keras.distribution.list_devices()
    shape = args.mesh or (len(devices), 1)
    if shape[0] * shape[1] > len(devices):
        raise SystemExit(
            f"--mesh must not have more devices than JAX finds. Received: {shape}, and {len(devices)} devices. "
            "Pass a smaller mesh."
        )
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices[: shape[0] * shape[1]])
    layouts = training.layout_map(mesh, args.sequence_parallel, args.fully_sharded)
    # Each process reads its own rows, see `text`.
    return keras.distribution.ModelParallel(layout_map=layouts, auto_shard_dataset=False)


def text(args, rows):
    """Returns batches of byte rows; of each batch, the rows of this process' devices.

    The text is on every machine. The mesh orders devices by process, so a process has several mesh rows, or several
    processes share one.
    """
    tokenizer = ByteTokenizer()
    texts, _ = documents(30_000 if args.size == "smoke" else 3_000_000)
    ids = [np.array(tokenizer.encode(x), "int32") for x in texts]
    shards = min(rows, args.processes)
    shard = (args.process * shards // args.processes, shards)
    return training.PackedText(ids, args.length, args.batch, eos_id=tokenizer.eos_token_id, shard=shard)


def train(args, rows):
    """Trains a model with checkpoints and returns the history of `fit`."""
    batches = text(args, rows)
    model = keras_jamba.JambaCausalLM(
        vocab_size=8 * -(-ByteTokenizer.vocab_size // 8), gradient_checkpointing=args.recompute, **SIZES[args.size]
    )
    steps = args.epochs * len(batches)
    model.compile(
        training.optimizer(model, steps=steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
    )
    local_bytes = sum(v.value.addressable_shards[0].data.nbytes for v in model.variables)
    print(f"{model.count_params():,} parameters; {local_bytes / 1e6:.1f} MB of them on each device", flush=True)
    checkpoint = training.Checkpoint(args.output / "saves", batches, every=args.every)
    csv = args.output / "log.csv" if args.process == 0 else None
    monitor = training.Monitor([training.Throughput(args.batch)], every=10, csv=csv)
    verbose = 2 if args.process == 0 else 0
    return model.fit(batches, epochs=args.epochs, callbacks=[monitor, checkpoint], verbose=verbose).history


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", type=mesh_of, metavar="ROWSxMODEL", help="default: all devices over rows")
    parser.add_argument("--fully-sharded", action="store_true", help="the first axis shares matrices too")
    parser.add_argument("--sequence-parallel", action="store_true", help="the second axis shares the tokens of a row")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=32, help="rows of all devices together")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--every", type=int, default=100, help="steps between two saves")
    parser.add_argument("--dtype", default="mixed_bfloat16")
    parser.add_argument("--coordinator", help="address of the first process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/several_devices"))
    args = parser.parse_args()
    if args.smoke:
        args.size, args.batch, args.length, args.every = "smoke", 16, 128, 2
    if args.coordinator:
        keras.distribution.initialize(args.coordinator, args.processes, args.process)
    keras.config.set_dtype_policy(args.dtype)
    keras.utils.set_random_seed(0)
    parallel = distribution(args)
    with parallel.scope():
        history = train(args, parallel.device_mesh.shape[0])
    if history.get("loss"):  # empty if the training had ended before
        print(f"loss {history['loss'][-1]:.4f}")


if __name__ == "__main__":
    main()

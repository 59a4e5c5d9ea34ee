"""Complete training steps of DHCJamba on a CPU, with a ViT and a ResNet of equal size as peers.

    KERAS_BACKEND=jax python -m benchmarks.training.step

Measures images per second of `train_on_batch` with AdamW in one interleaved run, with the "native" and the "portable"
scan. The shares of scans and convolutions are the times of one op, forward and backward at the model's shapes, times
their number in the model. Images of 32 x 32 are 64 tokens, images of 64 x 64 are 256. Then measures tokens per second
of `JambaBackbone.step`, one token at a time. Prints tables and writes results/training_step_BACKEND.json.
"""

import argparse
import contextlib
import os
import sys

import keras
import numpy as np
from keras import ops

import keras_jamba
from benchmarks import measure
from benchmarks.images.peers import of_equal_size, resnet, vit
from benchmarks.images.sizes import untrained
from keras_jamba.ops import causal_depthwise_conv, selective_scan

BACKEND = keras.backend.backend()
BATCHES = {32: 64, 64: 16}
NUM_DECODED_TOKENS = 20


@contextlib.contextmanager
def scan_implementation(name):
    """Sets the scan's implementation for all traces and calls inside the context."""
    os.environ["KERAS_JAMBA_SCAN"] = name
    try:
        yield
    finally:
        del os.environ["KERAS_JAMBA_SCAN"]


def with_scan(name, function):
    """Returns `function` with a fixed implementation of the scan, which PyTorch chooses anew at every call."""

    def call():
        with scan_implementation(name):
            return function()

    return call


def jamba_model(preset, size):
    return untrained(preset, image_shape=(size, size, 3))


def training_step(model, size):
    model.compile(keras.optimizers.AdamW(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng, batch = np.random.default_rng(0), BATCHES[size]
    x = rng.random((batch, size, size, 3), "float32")
    y = rng.integers(0, 10, batch)
    return lambda: model.train_on_batch(x, y)


def scan_and_convolution(model, size):
    """Returns one scan and one convolution at the model's shapes, forward and backward."""
    config = model.backbone.get_config()
    e, n, tokens = (
        config["expand"] * config["d_model"],
        config["d_state"],
        (size // model.get_config()["downsample"]) ** 2,
    )
    rng = np.random.default_rng(0)
    normal = lambda *shape: ops.convert_to_tensor(rng.standard_normal(shape).astype("float32"))  # noqa: E731
    sequence = (BATCHES[size], tokens, e)
    A = ops.convert_to_tensor(np.tile(-np.arange(1, n + 1, dtype="float32"), (e, 1)))
    states = [normal(*sequence[:2], n) for _ in range(2)]
    scan = [normal(*sequence), normal(*sequence) - 4, A, *states, normal(e), normal(*sequence), normal(e)]
    convolution = [normal(*sequence), normal(config["d_conv"], e), normal(e)]
    return {
        "scan": measure.forward_and_gradient(
            lambda *tensors: selective_scan(*tensors, delta_softplus=True), [*scan, normal(*sequence)]
        )[1],
        "convolution": measure.forward_and_gradient(
            lambda *tensors: causal_depthwise_conv(*tensors, activation="silu"), [*convolution, normal(*sequence)]
        )[1],
    }


def training_steps(preset, size, rounds):
    ours = jamba_model(preset, size)
    parameters = ours.count_params()
    peers = {
        "ViT": of_equal_size(vit, range(32, 257, 16), (size, size, 3), parameters),
        "ResNet": of_equal_size(resnet, range(8, 97, 4), (size, size, 3), parameters),
    }
    steps = {name: with_scan(name, training_step(jamba_model(preset, size), size)) for name in ("native", "portable")}
    steps |= {name: training_step(model, size) for name, model in peers.items()} | scan_and_convolution(ours, size)
    seconds = measure.interleaved(steps, rounds)
    count = sum(mixer == "mamba" for mixer, _ in ours.block_pattern)
    share = lambda op: round(count * seconds[op] / seconds["native"], 3)  # noqa: E731
    return {
        "preset": preset,
        "image": size,
        "batch": BATCHES[size],
        "parameters": {preset: parameters} | {name: model.count_params() for name, model in peers.items()},
        "images per second": {
            name: round(BATCHES[size] / seconds[name], 1) for name in ("native", "portable", "ViT", "ResNet")
        },
        "share of the scans": share("scan"),
        "share of the convolutions": share("convolution"),
    }


def decoding_rates(rounds):
    """Returns tokens per second of single steps at batch 1, with the "native" and the "portable" scan."""
    rates = {}
    for name in ("native", "portable"):
        backbone = keras_jamba.JambaBackbone(d_model=64, num_layers=8, mamba_ratio=7)
        token, cache, step = ops.ones((1, 1, 64)), backbone.init_cache(1, max_length=256), backbone.step
        if BACKEND == "jax":
            import jax

            step = jax.jit(lambda token, cache, backbone=backbone: backbone.step(token, cache))
        elif BACKEND == "tensorflow":
            import tensorflow as tf

            step = tf.function(backbone.step, autograph=False)

        def run(step=step, token=token, cache=cache):
            for _ in range(NUM_DECODED_TOKENS):
                outputs, cache = step(token, cache)
            ops.convert_to_numpy(outputs)

        rates[name] = with_scan(name, without_gradients(run))
    return {name: round(NUM_DECODED_TOKENS / value, 1) for name, value in measure.interleaved(rates, rounds).items()}


def without_gradients(function):
    if BACKEND != "torch":
        return function
    import torch

    return torch.no_grad()(function)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    results = []
    for preset in ("small", "medium"):
        for size in (32, 64):
            results.append(training_steps(preset, size, args.rounds))
            print(results[-1], file=sys.stderr, flush=True)
    decoded = decoding_rates(args.rounds)
    rows = [
        {"preset": r["preset"], "image": r["image"], **r["images per second"]}
        | {"scans": f"{r['share of the scans']:.1%}", "convolutions": f"{r['share of the convolutions']:.1%}"}
        for r in results
    ]
    print("Images per second, and shares of the step:\n" + measure.table(rows, list(rows[0])))
    print(f"JambaBackbone.step, tokens per second: {decoded}")
    measure.record(f"training_step_{BACKEND}", {"steps": results, "decoding, tokens per second": decoded})


if __name__ == "__main__":
    main()

"""Whole training steps of DHCJamba on this CPU, beside a ViT and a ResNet of as many parameters.

    KERAS_BACKEND=jax python benchmarks/training_step.py

Images per second of `train_on_batch` with AdamW in one interleaved run, the scan with the native kernel and without,
and what part of the step the scans and the convolutions take: so many of them, forward and backward, at the model's
shapes. Images of 32 x 32 are 64 tokens, images of 64 x 64 are 256. Then tokens per second of `JambaBackbone.step`, one
token at a time. Prints tables and writes results/training_step_BACKEND.json.
"""

import argparse
import contextlib
import os
import sys

import keras
import measure
import numpy as np
from keras import layers, ops

import keras_jamba
from keras_jamba.ops import causal_depthwise_conv, selective_scan

BACKEND = keras.backend.backend()
BATCHES = {32: 64, 64: 16}
DECODED = 20


@contextlib.contextmanager
def scan_as(name):
    """The scan's implementation, for what is traced and called inside."""
    os.environ["KERAS_JAMBA_SCAN"] = name
    try:
        yield
    finally:
        del os.environ["KERAS_JAMBA_SCAN"]


def within(name, function):
    """PyTorch does not trace: at every call it must find the same implementation."""

    def call():
        with scan_as(name):
            return function()

    return call


def jamba(preset, size):
    return keras_jamba.DHCJamba.from_preset(preset, image_shape=(size, size, 3), num_classes=10)


class Positions(layers.Layer):
    """Adds a learned vector to each token."""

    def build(self, shape):
        self.table = self.add_weight(shape[1:], "random_normal", name="table")

    def call(self, x):
        return x + self.table


def vit(width, size, depth=8):
    """A vision transformer on patches of 4 x 4, heads of 16 channels, Dosovitskiy et al. (2021)."""
    inputs = keras.Input((size, size, 3))
    x = layers.Reshape((-1, width))(layers.Conv2D(width, 4, strides=4)(inputs))
    x = Positions()(x)
    for _ in range(depth):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(width // 16, 16)(y, y)
        y = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(y)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def resnet(width, size):
    """Three stages of three residual blocks, He et al. (2016), section 4.2."""
    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(width, 3, padding="same")(inputs)
    for stage in range(3):
        for block in range(3):
            channels, stride = width * 2**stage, 2 if stage and not block else 1
            y = layers.Conv2D(channels, 3, strides=stride, padding="same", use_bias=False)(x)
            y = layers.Activation("relu")(layers.BatchNormalization()(y))
            y = layers.BatchNormalization()(layers.Conv2D(channels, 3, padding="same", use_bias=False)(y))
            x = x if stride == 1 else layers.Conv2D(channels, 1, strides=stride)(x)
            x = layers.Activation("relu")(x + y)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def of_equal_size(make, widths, size, parameters):
    """The model of these widths whose number of parameters is nearest."""
    width = min(widths, key=lambda width: abs(make(width, size).count_params() - parameters))
    return make(width, size)


def step_of(model, size):
    model.compile(keras.optimizers.AdamW(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng, batch = np.random.default_rng(0), BATCHES[size]
    x = rng.random((batch, size, size, 3), "float32")
    y = rng.integers(0, 10, batch)
    return lambda: model.train_on_batch(x, y)


def scan_and_convolution(model, size):
    """One of each at the model's shapes, forward and backward."""
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
    ours = jamba(preset, size)
    parameters = ours.count_params()
    peers = {
        "ViT": of_equal_size(vit, range(32, 257, 16), size, parameters),
        "ResNet": of_equal_size(resnet, range(8, 97, 4), size, parameters),
    }
    steps = {name: within(name, step_of(jamba(preset, size), size)) for name in ("native", "portable")}
    steps |= {name: step_of(model, size) for name, model in peers.items()} | scan_and_convolution(ours, size)
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


def decoding(rounds):
    """Tokens per second of one step at a time, batch 1, with the native scan and without."""
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
            for _ in range(DECODED):
                outputs, cache = step(token, cache)
            ops.convert_to_numpy(outputs)

        rates[name] = within(name, without_gradients(run))
    return {name: round(DECODED / value, 1) for name, value in measure.interleaved(rates, rounds).items()}


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
    decoded = decoding(args.rounds)
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

"""Whole training steps of DHCJamba on this CPU, beside a ViT and a ResNet of as many parameters.

    KERAS_BACKEND=jax python benchmarks/training_step.py

Images per second of `train_on_batch` with AdamW, in one interleaved run: DHCJamba with the native kernels, without
them, and with the scan or the convolution taken out, whose shares of the step that gives.  Images of 32 x 32 are 64
tokens, images of 64 x 64 are 256.  Then tokens per second of `JambaBackbone.step`, one token at a time.  Prints a
table and writes results/training_step_BACKEND.json.
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
from keras_jamba.layers import _selective_ssm

BACKEND = keras.backend.backend()
BATCHES = {32: 64, 64: 16}


@contextlib.contextmanager
def patched(**replacements):
    """Other functions in the place of those that the Mamba layer calls, while a model is traced."""
    before = {name: getattr(_selective_ssm, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(_selective_ssm, name, replacement)
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(_selective_ssm, name, original)


@contextlib.contextmanager
def portable():
    os.environ["KERAS_JAMBA_SCAN"] = "portable"
    convolution = _selective_ssm.causal_depthwise_conv
    try:
        with patched(causal_depthwise_conv=lambda *a, **k: convolution(*a, **k, implementation="portable")):
            yield
    finally:
        del os.environ["KERAS_JAMBA_SCAN"]


def no_scan(u, delta, A, B, C, D, z, delta_bias, **given):
    """All inputs are still needed, but nothing runs over time."""
    rest = ops.mean(B + C, axis=-1, keepdims=True) + ops.mean(A)
    return (u * D + delta + delta_bias + rest) * ops.silu(z), None


def no_convolution(x, kernel, bias, state, **given):
    return ops.silu(x * kernel[-1] + bias), None


WAYS = {
    "native": contextlib.nullcontext,
    "portable": portable,
    "without the scan": lambda: patched(selective_scan=no_scan),
    "without the convolution": lambda: patched(causal_depthwise_conv=no_convolution),
}


def jamba(preset, size):
    return keras_jamba.DHCJamba.from_preset(preset, image_shape=(size, size, 3), num_classes=10, load_weights=False)


def vit(width, size, depth=8):
    """A vision transformer on patches of 4 x 4, heads of 16 channels, Dosovitskiy et al. (2021)."""
    inputs = keras.Input((size, size, 3))
    x = layers.Reshape((-1, width))(layers.Conv2D(width, 4, strides=4)(inputs))
    x = x + layers.Embedding(x.shape[1], width)(ops.arange(x.shape[1]))
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


def traced(way, preset, size):
    with WAYS[way]():
        step = step_of(jamba(preset, size), size)
        step()

    # PyTorch does not trace: what is replaced must be so at every call.
    def again():
        with WAYS[way]():
            step()

    return again


def training_steps(preset, size, rounds):
    parameters = jamba(preset, size).count_params()
    steps = {way: traced(way, preset, size) for way in WAYS}
    peers = {
        "ViT": of_equal_size(vit, range(32, 257, 16), size, parameters),
        "ResNet": of_equal_size(resnet, range(8, 97, 4), size, parameters),
    }
    steps |= {name: step_of(model, size) for name, model in peers.items()}
    seconds = measure.interleaved(steps, rounds)
    rates = {name: round(BATCHES[size] / value, 1) for name, value in seconds.items()}
    share = lambda way: round(1 - seconds[way] / seconds["native"], 2)  # noqa: E731
    return {
        "preset": preset,
        "image": size,
        "batch": BATCHES[size],
        "parameters": {preset: parameters} | {name: model.count_params() for name, model in peers.items()},
        "images per second": rates,
        "share of the scan": share("without the scan"),
        "share of the convolution": share("without the convolution"),
    }


def decoding(rounds):
    """Tokens per second of one step at a time, batch 1, with the native kernels and without."""
    rates = {}
    for way in ("native", "portable"):
        with WAYS[way]():
            backbone = keras_jamba.JambaBackbone(d_model=64, num_layers=8, mamba_ratio=7)
            cache = backbone.init_cache(1, max_length=256)
            token = ops.ones((1, 1, 64))
            step = backbone.step
            if BACKEND == "jax":
                import jax

                step = jax.jit(lambda token, cache, backbone=backbone: backbone.step(token, cache))
            elif BACKEND == "tensorflow":
                import tensorflow as tf

                step = tf.function(backbone.step, autograph=False)

            def run(step=step, token=token, cache=cache):
                for _ in range(20):
                    outputs, cache = step(token, cache)
                ops.convert_to_numpy(outputs)

            rates[way] = round(20 / measure.interleaved({way: run}, rounds)[way], 1)
    return rates


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
        {"preset": r["preset"], "image": r["image"], "scan": r["share of the scan"]}
        | {"convolution": r["share of the convolution"]}
        | r["images per second"]
        for r in results
    ]
    print(measure.table(rows, list(rows[0])))
    print(f"JambaBackbone.step, tokens per second: {decoded}")
    measure.record(f"training_step_{BACKEND}", {"steps": results, "decoding, tokens per second": decoded})


if __name__ == "__main__":
    main()

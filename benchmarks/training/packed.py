"""Cost of a packed training step, beside the plain step of as many tokens.

    KERAS_BACKEND=jax python -m benchmarks.training.packed

The step is one of `fit` of a language model with attention in one layer of eight. Plain rows are one document each.
Packed rows hold documents of random lengths, on average 128, 512 or 2,048 tokens, with `segment_ids`. On a CPU the
model is small. On a GPU it is that of `benchmarks.training.language_model`, and one more row has 131,072 tokens, with
gradient checkpointing. The script first checks that a packed row gives the losses of its documents alone. It then times
all steps of a shape in one interleaved run, and measures the memory of each in separate processes: on a CPU beyond that
of the process before, on a GPU beyond the weights. Prints the rows and writes results/packed_BACKEND.json, or
gpu_packed_BACKEND.json on a GPU.
"""

import argparse
import json

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.training.language_model import LARGE, POLICY, fitting, without_tf32
from keras_jamba import _backend, training
from keras_jamba.converters import jamba

BACKEND = keras.backend.backend()
ON_GPU = _backend.tensors.platform() == "gpu"
DOCUMENTS = (128, 512, 2048)
SMALL = dict(vocab_size=256, d_model=128, num_layers=8, mamba_ratio=7, num_heads=4, moe_frequency=0)
# Rows and tokens per batch.
SHAPES = {"gpu": [(4, 4096), (1, 16384), (1, 131072)], "cpu": [(1, 4096), (1, 16384)]}["gpu" if ON_GPU else "cpu"]
# Rows of more tokens train with gradient checkpointing.
LONGEST = 65536


def model_of(tokens):
    keras.utils.set_random_seed(0)
    if not ON_GPU:
        return keras_jamba.JambaCausalLM(**SMALL)
    config = {"model_type": "jamba", "architectures": ["JambaForCausalLM"]} | LARGE
    return keras_jamba.JambaCausalLM(**jamba.arguments(config), dtype=POLICY, gradient_checkpointing=tokens > LONGEST)


def batch_of(document, rows, tokens):
    """Returns inputs and targets of random tokens. `document` is the mean number of tokens, None for one document."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (rows, tokens + 1)).astype("int32")
    inputs = {"token_ids": ids[:, :-1]}
    if document is not None:
        inputs["segment_ids"] = np.cumsum(rng.random((rows, tokens)) < 1 / document, axis=1).astype("int32")
    return inputs, ids[:, 1:]


def compiled(model):
    model.compile(training.optimizer(model, steps=10000), weighted_metrics=None)
    return model


def count_of(tokens):
    """Returns the number of batches per call of `fit`."""
    return 8 if ON_GPU and tokens <= LONGEST else 1


def steps_of(model, document, rows, tokens):
    """Returns the training steps of one call of `fit` as a function without arguments."""
    return fitting(model, *batch_of(document, rows, tokens), steps=count_of(tokens))


def peak_of(document, rows, tokens):
    """Returns the peak MiB of a step, for `--memory`."""
    steps = steps_of(compiled(model_of(tokens)), document, rows, tokens)
    return 1024 * measure.extra_device_memory(steps) if ON_GPU else measure.extra_memory(steps)


def check():
    """Compares the logits of a packed row with those of its documents alone, in a small float32 model."""
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(**SMALL)
    inputs, _ = batch_of(256, 1, 1024)
    ids = inputs["segment_ids"][0]
    with without_tf32():
        packed = keras.ops.convert_to_numpy(model(inputs))[0]
        first = np.unique(ids)[:4]
        alone = [model({"token_ids": inputs["token_ids"][:, ids == document]}) for document in first]
    for document, logits in zip(first, alone, strict=True):
        np.testing.assert_allclose(packed[ids == document], keras.ops.convert_to_numpy(logits)[0], rtol=1e-3, atol=1e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", help="JSON [document, rows, tokens]: print only the peak MiB of its step")
    args = parser.parse_args()
    if args.memory:
        print(peak_of(*json.loads(args.memory)))
        return
    check()
    rows = []
    for shape in SHAPES:
        rows += rows_of(shape, args.rounds)
        # A run that ends early keeps the shapes before.
        measure.record(f"{'gpu_' if ON_GPU else ''}packed_{BACKEND}", {"backend": BACKEND, "rows": rows})


def rows_of(shape, rounds):
    """Returns the rows of the record for a shape, rows and tokens."""
    model = compiled(model_of(shape[1]))
    steps = {document: steps_of(model, document, *shape) for document in (None, *DOCUMENTS)}
    for step in steps.values():
        # PyTorch captures the fourth step on a GPU.
        for _ in range(4 if ON_GPU and count_of(shape[1]) == 1 else 1):
            step()
    seconds, rows = measure.interleaved(steps, rounds), []
    for document, value in seconds.items():
        row = {"rows": shape[0], "tokens": shape[1], "document": document}
        row |= {"ms": round(1e3 * value / count_of(shape[1]), 1), "packed / plain": round(value / seconds[None], 3)}
        # The memory does not depend on the documents.
        if document in (None, DOCUMENTS[1]):
            row["MiB"] = measure.memory_in_a_process(__spec__.name, document, *shape)
        rows.append(row)
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    main()

"""The same training in float32 and in bfloat16: the loss that each ends with.

    KERAS_BACKEND=jax python benchmarks/training_precision.py

A small language model on text that a random Markov chain of order 1 writes, whose entropy no model can get below;
all policies see the same batches from the same start. Prints the loss on held-out text and how far it is from
float32's, and writes results/training_precision_BACKEND.json.
"""

import argparse
import time

import keras
import measure
import numpy as np

import keras_jamba
from keras_jamba import training

WORDS, LENGTH, BATCH = 64, 64, 32
POLICIES = ("float32", "mixed_bfloat16", "bfloat16")


def chain():
    """Probabilities of the next word, and those of a word anywhere."""
    rng = np.random.default_rng(0)
    matrix = rng.dirichlet(np.full(WORDS, 0.3), WORDS)
    values, vectors = np.linalg.eig(matrix.T)
    anywhere = np.abs(np.real(vectors[:, np.argmax(np.real(values))]))
    return matrix, anywhere / anywhere.sum()


def text(matrix, rows, seed):
    rng = np.random.default_rng(seed)
    bounds = matrix.cumsum(axis=1)
    words = np.empty((rows, LENGTH + 1), "int32")
    words[:, 0] = rng.integers(0, WORDS, rows)
    for t in range(LENGTH):
        drawn = rng.random((rows, 1))
        words[:, t + 1] = np.minimum((bounds[words[:, t]] < drawn).sum(axis=1), WORDS - 1)
    return words[:, :-1], words[:, 1:]


def model(policy, steps):
    keras.utils.set_random_seed(0)
    words = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(WORDS, 128, dtype=policy)(words)
    x = keras_jamba.JambaBackbone(d_model=128, num_layers=4, mamba_ratio=3, num_experts=4, d_ff=256, dtype=policy)(x)
    made = keras.Model(words, keras.layers.Dense(WORDS, dtype="float32")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(training.optimizer(made, steps, learning_rate=1e-3), loss)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    matrix, anywhere = chain()
    floor = float(-(anywhere * (matrix * np.log(matrix + 1e-30)).sum(axis=1)).sum())
    batches = training.Batches(text(matrix, args.steps * BATCH, seed=1), BATCH, shuffle=False)
    held_out = text(matrix, 1024, seed=2)
    ends = {}
    for policy in POLICIES:
        trained, started = model(policy, args.steps), time.perf_counter()
        trained.fit(batches, verbose=0)
        seconds = time.perf_counter() - started
        # The loss of the text alone: what experts add is left out.
        logits = trained.predict(held_out[0], batch_size=256, verbose=0).astype("float64")
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, held_out[1][..., None], axis=-1)[..., 0]
        loss = float((np.log(np.exp(logits).sum(axis=-1)) - chosen).mean())
        ends[policy] = {"loss": loss, "seconds": round(seconds, 1)}
        ends[policy]["to float32"] = f"{loss / ends['float32']['loss'] - 1:+.3%}"
        print(policy, ends[policy], flush=True)
    print(f"the chain's entropy: {floor:.4f}")
    results = {"steps": args.steps, "entropy": floor, "device": keras_jamba._backend.device.device_name(), "ends": ends}
    measure.record(f"training_precision_{keras.backend.backend()}", results)


if __name__ == "__main__":
    main()

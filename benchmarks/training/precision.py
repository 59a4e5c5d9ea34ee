"""Final losses of the same training in float32 and in bfloat16.

    KERAS_BACKEND=jax python -m benchmarks.training.precision

Trains a small language model on text of a random Markov chain of order 1, whose entropy is the lowest possible loss.
All policies start from the same weights and read the same batches. Prints the loss on held-out text and its difference
from that of float32. Writes results/training_precision_BACKEND.json.
"""

import argparse
import time

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from keras_jamba import training

VOCABULARY, LENGTH, BATCH = 64, 64, 32
POLICIES = ("float32", "mixed_bfloat16", "bfloat16")


def markov_chain():
    """Returns the transition probabilities, one row per token, and the stationary distribution."""
    rng = np.random.default_rng(0)
    matrix = rng.dirichlet(np.full(VOCABULARY, 0.3), VOCABULARY)
    values, vectors = np.linalg.eig(matrix.T)
    stationary = np.abs(np.real(vectors[:, np.argmax(np.real(values))]))
    return matrix, stationary / stationary.sum()


def text(matrix, rows, seed):
    rng = np.random.default_rng(seed)
    bounds = matrix.cumsum(axis=1)
    tokens = np.empty((rows, LENGTH + 1), "int32")
    tokens[:, 0] = rng.integers(0, VOCABULARY, rows)
    for t in range(LENGTH):
        uniform = rng.random((rows, 1))
        tokens[:, t + 1] = np.minimum((bounds[tokens[:, t]] < uniform).sum(axis=1), VOCABULARY - 1)
    return tokens[:, :-1], tokens[:, 1:]


def model(policy, steps):
    keras.utils.set_random_seed(0)
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, 128, dtype=policy)(tokens)
    x = keras_jamba.JambaBackbone(d_model=128, num_layers=4, mamba_ratio=3, num_experts=4, d_ff=256, dtype=policy)(x)
    made = keras.Model(tokens, keras.layers.Dense(VOCABULARY, dtype="float32")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(training.optimizer(made, steps, learning_rate=1e-3), loss)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    matrix, stationary = markov_chain()
    floor = float(-(stationary * (matrix * np.log(matrix + 1e-30)).sum(axis=1)).sum())
    batches = training.Batches(text(matrix, args.steps * BATCH, seed=1), BATCH, shuffle=False)
    held_out = text(matrix, 1024, seed=2)
    results = {}
    for policy in POLICIES:
        trained, started = model(policy, args.steps), time.perf_counter()
        trained.fit(batches, verbose=0)
        seconds = time.perf_counter() - started
        # The loss of the text alone, without the auxiliary losses of experts.
        logits = trained.predict(held_out[0], batch_size=256, verbose=0).astype("float64")
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, held_out[1][..., None], axis=-1)[..., 0]
        loss = float((np.log(np.exp(logits).sum(axis=-1)) - chosen).mean())
        results[policy] = {"loss": loss, "seconds": round(seconds, 1)}
        results[policy]["to float32"] = f"{loss / results['float32']['loss'] - 1:+.3%}"
        print(policy, results[policy], flush=True)
    print(f"the chain's entropy: {floor:.4f}")
    device = keras_jamba._backend.device.device_name()
    results = {"steps": args.steps, "entropy": floor, "device": device, "ends": results}
    measure.record(f"training_precision_{keras.backend.backend()}", results)


if __name__ == "__main__":
    main()

"""Cost of monitoring: steps of `fit` with all probes of `keras_jamba.training` and without callbacks.

    KERAS_BACKEND=jax python -m benchmarks.training.monitoring

Trains 0.8 M parameters (`images.sizes`) on images of the size of digits, alternating between both variants. Prints the
ratio of the medians and writes results/monitoring_BACKEND.json. `Checkpoint` is excluded, because it costs time only
when it saves.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

from benchmarks import measure
from benchmarks.images.sizes import untrained
from keras_jamba import estimation, training

BATCH, STEPS = 32, 100


def model():
    made = untrained("small", image_shape=(8, 8, 1), downsample=2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(training.optimizer(made, steps=10**6), loss)
    return made


def monitoring_callbacks(folder):
    flops = estimation.model_report(model(), batch_size=BATCH).flops_per_step
    probes = [training.ExpertUsage(), training.Throughput(BATCH, tokens=16), training.Memory(), training.GradientNorm()]
    probes += [training.LearningRate(), training.Utilisation(flops, peak="measured")]
    return [training.Monitor(probes, csv=folder / "log.csv", tensorboard=folder / "board")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    data = rng.random((STEPS * BATCH, 8, 8, 1), "float32"), rng.integers(0, 10, STEPS * BATCH)
    batches, trained, seconds = training.Batches(data, BATCH), model(), {"none": [], "all": []}
    with tempfile.TemporaryDirectory() as folder:
        callbacks = {"none": [], "all": monitoring_callbacks(Path(folder))}
        for name in callbacks:
            trained.fit(batches, verbose=0, callbacks=callbacks[name])
        for _ in range(args.rounds):
            for name in callbacks:
                started = time.perf_counter()
                trained.fit(batches, verbose=0, callbacks=callbacks[name])
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["all"] / medians["none"]
    print(
        f"{STEPS} steps: {medians['none']:.2f} s without, {medians['all']:.2f} s with all callbacks, ratio {ratio:.3f}"
    )
    measure.record(f"monitoring_{keras.backend.backend()}", {"seconds": medians, "ratio": round(ratio, 4)})


if __name__ == "__main__":
    main()

"""Trains, generates, saves and loads for an hour, and fits slopes to memory, open files, threads and leftover files.

    KERAS_BACKEND=torch python tests/release/soak.py --minutes 60

A second run of the same backend at the same time needs `--name`. The verdict is in `results/soak_BACKEND.json`.
"""

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# XLA compiles for most of the time otherwise.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ.setdefault("JAX_THREEFRY_PARTITIONABLE", "0")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import records  # noqa: E402

import keras_jamba  # noqa: E402
from keras_jamba import training  # noqa: E402
from keras_jamba.generation import PromptState  # noqa: E402

# The most growth per hour. An allocator that settles grows by some MB in its first hour.
BOUNDS = {"memory in MB": 30.0, "open files": 0.5, "threads": 0.5, "leftover files": 0.5}
# The share of the run before the first sample that counts.
WARM_UP = 0.2
_LENGTHS = (5, 9, 14)


class Images:
    """Rounds with an image model that stays: fit with callbacks, adapters on and off, saving and loading."""

    def __init__(self, folder):
        self.folder = folder
        arguments = dict(d_model=16, num_layers=2, mamba_ratio=1, num_experts=2, num_heads=2, image_shape=(8, 8, 1))
        self.model = keras_jamba.DHCJamba(num_classes=3, **arguments)
        rng = np.random.default_rng(0)
        self.data = rng.random((24, 8, 8, 1), "float32"), rng.integers(0, 3, 24)
        self._compile()

    def _compile(self):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(training.optimizer(self.model, steps=1000), loss)

    def round(self, number):
        adapts = number % 12 == 4
        if adapts:
            self.model.enable_lora(2)
        # The state of a model with adapters is of another form. The other rounds continue one training.
        place = self.folder / ("adapting" if adapts else "images")
        batches = training.Batches(self.data, 8, seed=0)
        checkpoint = training.Checkpoint(place, batches, every=2, keep=2)
        monitor = training.Monitor([training.Throughput(8), training.LearningRate()], 2, self.folder / "images.csv")
        self.model.fit(batches, epochs=number + 1, initial_epoch=number, verbose=0, callbacks=[checkpoint, monitor])
        self.model.predict(self.data[0][:8], verbose=0)
        if adapts:
            self.model.save_lora(self.folder / "adapters.safetensors")
            self.model.load_lora(self.folder / "adapters.safetensors")
            self.model.merge_lora()
            self._compile()
            shutil.rmtree(place)


class Text:
    """Rounds with a language model that stays, and with models that are loaded anew."""

    def __init__(self, folder):
        self.folder = folder
        sizes = dict(d_model=16, num_layers=2, mamba_ratio=1, num_heads=2, num_kv_heads=1, d_ff=16, d_state=4)
        self.model = keras_jamba.JambaCausalLM(27, **sizes, num_experts=3, moe_offset=0, pad_token_id=0)
        self.model.compile(keras.optimizers.Adam(1e-4))
        self.rows = np.random.default_rng(0).integers(1, 27, (16, 12))

    def round(self, number):
        self.model.fit(self.rows[:, :-1], self.rows[:, 1:], batch_size=8, verbose=0)
        for length in _LENGTHS:
            self.model.generate(self.rows[0, :length].tolist(), max_new_tokens=8, sampler="greedy")
        list(self.model.stream(self.rows[1, :6].tolist(), max_new_tokens=4, sampler="greedy"))
        self.model.prefill(self.rows[2, :6]).save(self.folder / "state")
        state = PromptState.load(self.folder / "state")
        self.model.generate(self.rows[2, :9].tolist(), max_new_tokens=4, sampler="greedy", state=state)
        if number % 8 == 3:
            self._load(number)

    def _load(self, number):
        self.model.save(self.folder / "text.keras")
        keras.saving.load_model(self.folder / "text.keras")
        place = self.folder / f"preset-{number}"
        self.model.save_to_preset(place)
        keras_jamba.JambaCausalLM.from_preset(place)
        shutil.rmtree(place)


def sample(folder):
    """Returns resident memory in MB, and the counts of open files, threads and leftovers of unfinished writes."""
    status = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in status if line.startswith(("VmRSS", "Threads"))}
    left = [*folder.rglob(".unfinished-*"), *folder.rglob(".replaced-*")]
    return {
        "memory in MB": int(values["VmRSS"]) * 1024 / 1e6,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": int(values["Threads"]),
        "leftover files": len(left),
    }


def slope(seconds, values):
    """Returns the slope per hour, the median of the slopes between all pairs: single outliers do not count."""
    pairs = itertools.combinations(zip(seconds, values, strict=True), 2)
    return float(np.median([(b - a) / (t - s) * 3600 for (s, a), (t, b) in pairs if t > s]))


def run(minutes, every, folder):
    """Returns `(samples, rounds)`: `[(seconds, sample)]`, taken between rounds, and the number of rounds."""
    parts, samples, started = [Images(folder), Text(folder)], [], time.monotonic()
    rounds, due = 0, 0.0
    while (now := time.monotonic() - started) < 60 * minutes:
        for part in parts:
            part.round(rounds)
        rounds += 1
        if now >= due:
            samples.append((time.monotonic() - started, sample(folder)))
            due = now + every
            shown = ", ".join(f"{name} {value:.0f}" for name, value in samples[-1][1].items())
            print(f"{now:7.0f} s, {rounds} rounds, {threading.active_count()} Python threads: {shown}", flush=True)
    return samples, rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=20, help="seconds between two samples")
    parser.add_argument("--name", default=f"soak_{keras.backend.backend()}", help="name of the file in results")
    given = parser.parse_args()
    keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        samples, rounds = run(given.minutes, given.every, Path(folder))
    kept = [(at, values) for at, values in samples if at >= WARM_UP * 60 * given.minutes]
    assert len(kept) > 2, f"the slope of {len(kept)} samples after the warm-up means nothing: run for longer"
    seconds = [at for at, _ in kept]
    slopes = {name: round(slope(seconds, [values[name] for _, values in kept]), 3) for name in BOUNDS}
    good = all(slopes[name] <= bound for name, bound in BOUNDS.items())
    figures = {"seed": 0, "minutes": given.minutes, "rounds": rounds, "samples": len(kept), "warm-up": WARM_UP}
    figures |= {"slopes per hour": slopes, "bounds per hour": BOUNDS, "first": kept[0][1], "last": kept[-1][1]}
    records.write(given.name, figures | {"verdict": "good" if good else "a slope is above its bound"})
    print(f"slopes per hour {slopes}, bounds {BOUNDS}: {'good' if good else 'BAD'}")
    return not good


if __name__ == "__main__":
    sys.exit(main())

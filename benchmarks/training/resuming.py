"""Resuming after kill -9: kills a tiny training 20 times at random steps and compares its final variables.

    KERAS_BACKEND=jax python -m benchmarks.training.resuming

The training is tests/subprocess/tiny_run.py, with 33 steps and a save every 3 steps. Each run continues from the last
save and is killed a random number of steps later. Prints the largest difference of any variable from an uninterrupted
run, and writes results/resuming_BACKEND.json.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import measure

SCRIPT = Path(__file__).parents[2] / "tests" / "subprocess" / "tiny_run.py"
LAST_STEP = 33


def run(folder, *step):
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.run([sys.executable, SCRIPT, folder, *map(str, step)], env=environment).returncode


def final_variables(folder):
    with np.load(Path(folder) / "end.npz") as file:
        return [file[f"arr_{i}"].astype("float64") for i in range(len(file.files))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    backend = os.environ.get("KERAS_BACKEND", "jax")
    # Rising order: a resumed run never repeats a step that was saved.
    steps = sorted(random.Random(args.seed).sample(range(1, LAST_STEP), args.kills))
    with tempfile.TemporaryDirectory() as complete, tempfile.TemporaryDirectory() as killed:
        assert run(complete) == 0
        for step in steps:
            assert run(killed, step) == -9, f"not killed at {step}"
        assert run(killed) == 0
        pairs = list(zip(final_variables(killed), final_variables(complete), strict=True))
    worst = max(float(np.abs(a - b).max()) for a, b in pairs if a.size)
    identical = all((a == b).all() for a, b in pairs)
    print(f"{backend}: killed after steps {steps}; largest difference {worst}, bit-identical: {identical}")
    measure.record(f"resuming_{backend}", {"killed after": steps, "largest difference": worst, "identical": identical})


if __name__ == "__main__":
    main()

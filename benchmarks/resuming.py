"""Kills a tiny training 20 times with kill -9, at random steps, and compares what it ends with.

    KERAS_BACKEND=jax python benchmarks/resuming.py

The training is tests/subprocess/tiny_run.py: 33 steps, saved every 3. Each time it is started again it goes on from its
last save, and is killed a random number of steps later. Prints the largest difference of any variable to those of a run
that was never killed, and writes results/resuming_BACKEND.json.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import numpy as np

SCRIPT = Path(__file__).parent.parent / "tests" / "subprocess" / "tiny_run.py"
LAST = 33


def run(folder, *step):
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.run([sys.executable, SCRIPT, folder, *map(str, step)], env=environment).returncode


def end(folder):
    with np.load(Path(folder) / "end.npz") as file:
        return [file[f"arr_{i}"].astype("float64") for i in range(len(file.files))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    backend = os.environ.get("KERAS_BACKEND", "jax")
    # In rising order: a run that is killed never comes again to a step that was saved.
    steps = sorted(random.Random(args.seed).sample(range(1, LAST), args.kills))
    with tempfile.TemporaryDirectory() as complete, tempfile.TemporaryDirectory() as broken:
        assert run(complete) == 0
        for step in steps:
            assert run(broken, step) == -9, f"not killed at {step}"
        assert run(broken) == 0
        pairs = list(zip(end(broken), end(complete), strict=True))
    worst = max(float(np.abs(a - b).max()) for a, b in pairs if a.size)
    identical = all((a == b).all() for a, b in pairs)
    print(f"{backend}: killed after steps {steps}; largest difference {worst}, bit-identical: {identical}")
    measure.record(f"resuming_{backend}", {"killed after": steps, "largest difference": worst, "identical": identical})


if __name__ == "__main__":
    main()

"""Accuracy of the image classification example on scikit-learn's digits, over seeds.

    KERAS_BACKEND=jax python benchmarks/digits.py [--seeds 0 1 2 3 4]

For each seed jax writes an untrained preset, and the example trains it on the backend that KERAS_BACKEND
names: same weights, same batches in the same order, same recipe on every backend (dropout differs, its
random numbers are the backend's).  The recipe was chosen on parts of the training half held out; here the
test half is looked at once a seed.  Writes results/digits_BACKEND.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

EXAMPLE = Path(__file__).parent.parent / "examples" / "image_classification.py"
INITIAL = """
import sys, keras, keras_jamba
keras.utils.set_random_seed(int(sys.argv[1]))
model = keras_jamba.DHCJamba.from_preset("small", num_classes=10, image_shape=(8, 8, 1), downsample=2)
model.save_to_preset(sys.argv[2])
"""


def run(backend, *arguments):
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    backend = os.environ.get("KERAS_BACKEND", "jax")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            initial, output = Path(folder) / f"initial{seed}", Path(folder) / f"trained{seed}"
            run("jax", "-c", INITIAL, str(seed), str(initial))
            run(backend, str(EXAMPLE), "--preset", str(initial), "--seed", str(seed), "--output", str(output))
            runs.append(json.loads((output / "results.json").read_text()))
            print(backend, seed, runs[-1]["test_accuracy"], f"{runs[-1]['seconds']} s", flush=True)
    mean = round(statistics.mean(r["test_accuracy"]["DHCJamba"] for r in runs), 2)
    print(f"{backend}: mean of {len(runs)} seeds {mean} %")
    measure.record(f"digits_{backend}", {"mean_test_accuracy": mean, "runs": runs})


if __name__ == "__main__":
    main()

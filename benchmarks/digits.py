"""Accuracy of the image classification example on scikit-learn's digits: five seeds, three backends.

    python benchmarks/digits.py [--seeds 0 1 2 3 4] [--backends jax tensorflow torch]

For each seed one untrained preset is written, and the example trains it on every backend in a process of
its own: same weights, same batches in the same order, same recipe (dropout differs, its random numbers are
the backend's).  The recipe was chosen with the example's --validation, on the last 20 % of the training
half; here the test half is looked at once a seed.  Writes results/digits.json.
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
    parser.add_argument("--backends", nargs="+", default=["jax", "tensorflow", "torch"])
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            initial = Path(folder) / f"seed{seed}"
            run("jax", "-c", INITIAL, str(seed), str(initial))
            for backend in args.backends:
                output = Path(folder) / f"{backend}{seed}"
                options = ("--preset", str(initial), "--seed", str(seed), "--output", str(output))
                run(backend, str(EXAMPLE), *options)
                runs.append(json.loads((output / "results.json").read_text()))
                print(backend, seed, runs[-1]["test_accuracy"], f"{runs[-1]['seconds']} s", flush=True)
    accuracy = {b: [r["test_accuracy"]["DHCJamba"] for r in runs if r["backend"] == b] for b in args.backends}
    means = {b: round(statistics.mean(values), 2) for b, values in accuracy.items()}
    print("means", means, "baselines", {k: round(v, 2) for k, v in runs[0]["test_accuracy"].items() if k != "DHCJamba"})
    measure.record("digits", {"mean_test_accuracy": means, "runs": runs})


if __name__ == "__main__":
    main()

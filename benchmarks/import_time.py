"""Time of `import keras_jamba` after `import keras`, on the backend that KERAS_BACKEND names.

    KERAS_BACKEND=jax python -m benchmarks.import_time

Every import runs in a separate process. The first import compiles byte code and does not count.
Writes results/import_time_BACKEND.json.
"""

import os
import statistics
import subprocess
import sys

from benchmarks import measure

CODE = """
import time
a = time.perf_counter()
import keras
b = time.perf_counter()
import keras_jamba
print(b - a, time.perf_counter() - b)
"""


def main(rounds=7):
    times = []
    # Processes that may not write byte code compile the package at every import.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(rounds + 1):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=env)
        times.append([float(x) for x in done.stdout.split()])
    keras, ours = (round(statistics.median(x), 3) for x in zip(*times[1:], strict=True))
    backend = os.environ.get("KERAS_BACKEND", "default")
    print(f"{backend}: import keras {keras} s, import keras_jamba {ours} s more")
    measure.record(f"import_time_{backend}", {"import_keras_s": keras, "import_keras_jamba_s": ours})


if __name__ == "__main__":
    main()

"""Error of the selective scan against float64 on long sequences, on the backend that KERAS_BACKEND names.

    KERAS_BACKEND=jax python -m benchmarks.scan.precision

The script first rounds the inputs to each dtype, and the float64 recurrence reads the rounded inputs. The error is
therefore that of the scan alone, including the rounding of its output. Time steps lie between 0.001 and 0.1 and A
between -1 and -16, as in a newly initialised model. Prints a table and writes results/precision_BACKEND.json.
"""

import argparse

import keras
import numpy as np
from keras import ops

from benchmarks import measure
from keras_jamba.ops import selective_scan

BACKEND = keras.backend.backend()
LENGTHS, CHANNELS, STATE = [1024, 16384, 65536], 32, 16
DTYPES = ["float32", "bfloat16", "float16"]


def random_inputs(length):
    """Returns u, delta, A, B and C as float32 arrays."""
    rng = np.random.default_rng(length)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    delta = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (1, length, CHANNELS))).astype("float32")
    A = np.tile(-np.arange(1, STATE + 1, dtype="float32"), (CHANNELS, 1))
    return normal(1, length, CHANNELS), delta, A, normal(1, length, STATE), normal(1, length, STATE)


def in_float64(u, delta, A, B, C):
    """Returns the outputs `(1, t, e)` and the last state `(1, e, n)` of the recurrence in float64."""
    u, delta, A, B, C = (np.asarray(x, "float64") for x in (u, delta, A, B, C))
    state, outputs = np.zeros(A.shape), []
    for t in range(u.shape[1]):
        decay = np.exp(delta[0, t, :, None] * A)
        state = decay * state + (delta[0, t] * u[0, t])[:, None] * B[0, t]
        outputs.append(state @ C[0, t])
    return np.stack(outputs)[None], state[None]


def errors(dtype, length):
    """Returns the root mean square error of outputs and last state, relative to their root mean square."""
    u, delta, A, B, C = (ops.convert_to_tensor(x) for x in random_inputs(length))
    u, delta, B, C = (ops.cast(x, dtype) for x in (u, delta, B, C))
    actual = selective_scan(u, delta, A, B, C, return_last_state=True)
    exact = in_float64(*(ops.convert_to_numpy(ops.cast(x, "float32")) for x in (u, delta, A, B, C)))
    result = {"dtype": dtype, "tokens": length}
    for name, a, e in zip(("output", "last state"), actual, exact, strict=True):
        a = ops.convert_to_numpy(ops.cast(a, "float32")).astype("float64")
        if not np.isfinite(a).all():
            raise AssertionError(f"{name} is not finite: {dtype}, {length} tokens")
        result[name] = f"{np.sqrt(np.square(a - e).mean() / np.square(e).mean()):.1e}"
    return result


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = [errors(dtype, length) for dtype in DTYPES for length in LENGTHS]
    print(measure.table(rows, list(rows[0])))
    measure.record(f"precision_{BACKEND}", {"backend": BACKEND, "relative_rms_error": rows})


if __name__ == "__main__":
    main()
